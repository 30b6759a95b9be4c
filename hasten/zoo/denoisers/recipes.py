"""Recipes for the picture models of the zoo and for the parts that they share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hasten.errors import HastenError
from hasten.training.loop import Outcome, Settings, Stage, fit
from hasten.training.memory import keep_freed_memory
from hasten.zoo.denoisers.data import SceneClips, ScenePictures
from hasten.zoo.output import (
    Card,
    beside_output,
    checked_output,
    describe_run,
    new_folder,
    torch_state,
    weights_hash,
)
from hasten.zoo.scenes.caption import HELD_OUT, prompts
from hasten.zoo.scenes.judge import (
    Judge,
    Marked,
    features,
    frechet,
    judge_loss,
    judge_quality,
    load_judge,
    mark,
    save_judge,
    set_scale,
)
from hasten.zoo.scenes.render import render
from hasten.zoo.scenes.scene import draw_many

if TYPE_CHECKING:
    from hasten.zoo.denoisers.base import Denoiser

GRID = "grid.png"


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe:
    """The judge of pictures."""

    name: str
    training: Settings
    widths: tuple[int, int, int] = (32, 64, 96)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """An autoencoder of pictures, or of clips (`video`).

    Attributes:
        kernels: whether Muon updates the kernels of convolutions, as matrices; else AdamW does.
    """

    name: str
    training: Settings
    widths: tuple[int, ...]
    latent_channels: int = 8
    video: bool = False
    kernels: bool = False


@dataclass(frozen=True, kw_only=True)
class PictureRecipe:
    """A picture model: its shape, the run that trains it, and the call that shows it at its best.

    Attributes:
        kind: dit, unet or video.
        autoencoder: the name of its autoencoder's recipe.
        shape: keywords of the class in dit.py, unet.py or video.py.
        sampling: arguments of the pipeline's call.
        average: how much of the running mean of the weights is kept in each step.
        judged: samples on which its card's figures rest.
    """

    name: str
    kind: str
    autoencoder: str
    training: Settings
    shape: dict[str, Any]
    sampling: dict[str, Any]
    size: int = 64
    frames: int = 1
    average: float = 0.998
    halved: float = 0.0  # share of large batches that hold pictures of half the size
    halved_from: int = 0  # and the first step that can be one of them
    judged: int = 128

    def __post_init__(self) -> None:
        if self.kind not in ("dit", "unet", "video"):
            raise HastenError(f"recipe {self.name}: kind={self.kind!r}; give dit, unet or video")


AnyRecipe = JudgeRecipe | AutoencoderRecipe | PictureRecipe


@dataclass(frozen=True, kw_only=True)
class PictureCard(Card):
    """A card with the call that shows the model at its best, and the grid's captions."""

    sampling: dict[str, Any] = field(default_factory=dict)
    grid: list[str] = field(default_factory=list)


def _stages(*parts: tuple[int, float]) -> tuple[Stage, ...]:
    return tuple(Stage(length=length, share=share) for length, share in parts)


def _quick(steps: int, *parts: tuple[int, float]) -> Settings:
    """Many small steps and high rates: there is under a minute."""
    return Settings(
        tokens=steps * 2048,
        batch_tokens=2048,
        stages=_stages(*parts),
        matrix_lr=0.02,
        other_lr=5e-3,
        compile=False,
    )


_SAMPLING = {"num_inference_steps": 50, "guidance_scale": 4.0}

RECIPES: dict[str, AnyRecipe] = {
    recipe.name: recipe
    for recipe in (
        JudgeRecipe(
            name="scenes-judge",
            training=Settings(
                tokens=1000 * 64,
                batch_tokens=64,
                stages=_stages((1, 1.0)),
                other_lr=3e-3,
                compile=False,
            ),
        ),
        AutoencoderRecipe(
            name="scenes-vae",
            widths=(16, 32, 64),
            training=Settings(
                tokens=1300 * 8192,
                stages=_stages((64, 0.2), (256, 0.8)),
                other_lr=2e-3,
                compile=False,
            ),
        ),
        AutoencoderRecipe(
            name="scenes-video-vae",
            widths=(64,),
            latent_channels=16,
            video=True,
            kernels=True,
            training=Settings(
                tokens=6000 * 2048,
                batch_tokens=2048,
                stages=_stages((64, 0.4), (512, 0.6)),
                matrix_lr=0.03,
                matrix_decay=0.0,
                other_lr=2e-3,
                compile=False,
            ),
        ),
        PictureRecipe(
            name="scenes-dit",
            kind="dit",
            autoencoder="scenes-vae",
            shape={"width": 192, "layers": 8, "heads": 3, "words_dim": 96},
            sampling=_SAMPLING,
            halved=0.35,
            halved_from=400,
            training=Settings(
                tokens=2000 * 8192,
                stages=_stages((256, 1.0)),
                warmup_share=0.03,
                other_lr=2e-3,
                decay_share=0.5,
                compile=False,
            ),
        ),
        PictureRecipe(
            name="scenes-unet",
            kind="unet",
            autoencoder="scenes-vae",
            shape={"widths": (64, 96, 128), "heads": 4, "words_dim": 96},
            sampling=_SAMPLING,
            training=Settings(
                tokens=2600 * 8192,
                stages=_stages((256, 1.0)),
                other_lr=1e-3,
                decay_share=0.5,
                compile=False,
            ),
        ),
        PictureRecipe(
            name="scenes-video",
            kind="video",
            autoencoder="scenes-video-vae",
            shape={"width": 128, "layers": 8, "heads": 2, "words_dim": 96},
            sampling={**_SAMPLING, "height": 32, "width": 32, "num_frames": 8},
            size=32,
            frames=8,
            judged=64,
            training=Settings(
                tokens=2600 * 4096,
                batch_tokens=4096,
                stages=_stages((64, 0.5), (512, 0.5)),
                other_lr=2e-3,
                decay_share=0.5,
                compile=False,
            ),
        ),
        # Small enough for tests: colours and places come out, shapes hardly.
        PictureRecipe(
            name="scenes-dit-tiny",
            kind="dit",
            autoencoder="scenes-vae",
            shape={"width": 64, "layers": 4, "heads": 1, "words_dim": 32},
            sampling={**_SAMPLING, "num_inference_steps": 10},
            average=0.98,
            judged=16,
            training=_quick(250, (64, 0.8), (256, 0.2)),
        ),
        PictureRecipe(
            name="scenes-unet-tiny",
            kind="unet",
            autoencoder="scenes-vae",
            shape={"widths": (32, 64), "heads": 2, "words_dim": 32},
            sampling={**_SAMPLING, "num_inference_steps": 10},
            average=0.98,
            judged=16,
            training=_quick(200, (256, 1.0)),
        ),
        PictureRecipe(
            name="scenes-video-tiny",
            kind="video",
            autoencoder="scenes-video-vae",
            shape={"width": 64, "layers": 4, "heads": 1, "words_dim": 32},
            sampling={
                **_SAMPLING,
                "num_inference_steps": 10,
                "height": 32,
                "width": 32,
                "num_frames": 8,
            },
            size=32,
            frames=8,
            average=0.98,
            judged=8,
            training=_quick(150, (64, 0.7), (512, 0.3)),
        ),
    )
}


def recipe(name: str) -> AnyRecipe:
    """The recipe of that name.

    Raises:
        HastenError: where there is none.
    """
    if name not in RECIPES:
        raise HastenError(f"no recipe named {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def train(
    name_or_recipe: str | AnyRecipe,
    output: Path,
    *,
    threads: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    resume: bool = False,
    quiet: bool = False,
    parts: Path | None = None,
) -> Card:
    """Run a recipe and write the model to the folder `output`, whole or not at all.

    Args:
        threads, max_tokens, seed, resume, quiet: as `zoo.recipes.train`.
        parts: a folder that holds the autoencoders and the judge, by their names (default: the
            shipped ones, or the user's).

    Raises:
        HastenError: where the name is unknown, a part is missing or `output` is taken.
        KeyboardInterrupt: on Ctrl-C; what was learnt is kept for `resume`.
    """
    chosen = recipe(name_or_recipe) if isinstance(name_or_recipe, str) else name_or_recipe
    settings = replace(chosen.training, seed=seed)
    if max_tokens is not None:
        settings = replace(settings, tokens=min(max_tokens, settings.tokens))
    chosen = replace(chosen, training=settings)
    output = checked_output(Path(output))
    checkpoint = beside_output(output, "checkpoint")
    run = _Run(output, checkpoint, resume, quiet, parts)
    if not isinstance(chosen, JudgeRecipe) and find_spec("diffusers") is None:
        raise HastenError(
            f"{chosen.name} is made with diffusers; install it with: pip install 'hasten[diffusion]'"
        )
    with torch_state(threads, seed), keep_freed_memory():
        if isinstance(chosen, JudgeRecipe):
            card = _train_judge(chosen, run)
        elif isinstance(chosen, AutoencoderRecipe):
            card = _train_autoencoder(chosen, run)
        else:
            card = _train_denoiser(chosen, run)
    checkpoint.unlink(missing_ok=True)
    return card


@dataclass(frozen=True)
class _Run:
    """Where a run writes, and how it is run."""

    output: Path
    checkpoint: Path
    resume: bool
    quiet: bool
    parts: Path | None

    def fit(
        self, model: nn.Module, data: Any, settings: Settings, loss: Any, **more: Any
    ) -> Outcome:
        return fit(
            model,
            data,
            settings,
            loss,
            checkpoint=self.checkpoint,
            resume=self.resume,
            quiet=self.quiet,
            **more,
        )

    def part(self, name: str) -> Path:
        from hasten.zoo.catalogue import part_path

        return part_path(name) if self.parts is None else self.parts / name


# The judge.


@dataclass(frozen=True)
class _MarkedScenes:
    seed: int

    def batch(self, index: int, rows: int, length: int) -> Marked:
        return mark(draw_many(rows, self.seed, start=index * rows))


def _train_judge(chosen: JudgeRecipe, run: _Run) -> Card:
    held_out = mark(draw_many(512, HELD_OUT + chosen.training.seed))
    judge = Judge(chosen.widths)
    outcome = run.fit(
        judge,
        _MarkedScenes(chosen.training.seed),
        chosen.training,
        judge_loss,
        evaluate=lambda model: judge_quality(model, held_out),
        num_evaluations=8,
        average=0.99,
        label=chosen.name,
    )
    judge.eval()
    set_scale(judge, held_out.pictures)
    judge.bfloat16().float()  # as it is stored
    quality = {"loss": outcome.final_loss, **judge_quality(judge, held_out)}
    quality |= judge_separates(judge)
    with new_folder(run.output) as folder:
        save_judge(judge, folder)
        card = Card(
            name=chosen.name,
            num_parameters=_count(judge),
            data=_drawn(outcome.tokens, "pictures of 64 pixels, half of them noisy or blurred"),
            training=describe_run(outcome),
            quality=quality,
            recipe=asdict(chosen),
            sha256=weights_hash(folder),
        )
        card.save(folder / "card.json")
    return card


def judge_separates(judge: Judge, *, num: int = 1024, seed: int = 1) -> dict[str, float]:
    """Frechet distances of held-out scenes to others of the same number, as they are and spoilt."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        real = features(judge, render(draw_many(num, 2 * HELD_OUT + seed)))
        scenes = draw_many(num, 3 * HELD_OUT + seed)
        others = render(scenes)

        def distance(pictures: Tensor) -> float:
            return frechet(features(judge, pictures), real)

        lonely = [replace(scene, objects=scene.objects[:1]) for scene in scenes]
        return {
            "frechet_of_real": distance(others),
            "frechet_of_noise_05": distance(others + 0.05 * torch.randn_like(others)),
            "frechet_of_noise_10": distance(others + 0.10 * torch.randn_like(others)),
            "frechet_of_noise_20": distance(others + 0.20 * torch.randn_like(others)),
            "frechet_of_blur": distance(
                nn.functional.avg_pool2d(others, 3, 1, 1, count_include_pad=False)
            ),
            "frechet_of_single_objects": distance(render(lonely)),
        }


# The autoencoders.


def _train_autoencoder(chosen: AutoencoderRecipe, run: _Run) -> Card:
    from hasten.zoo.denoisers import autoencoder as kind

    model: Any
    data: ScenePictures | SceneClips
    seed = chosen.training.seed
    if chosen.video:
        from hasten.zoo.denoisers.video import new_video_autoencoder

        model = new_video_autoencoder(chosen.widths[0], chosen.latent_channels)
        data = SceneClips(seed)
        quality_of: Callable[[nn.Module], dict[str, float]] = kind.video_autoencoder_quality
    else:
        channels = chosen.widths
        assert len(channels) == 3
        model = kind.new_autoencoder(
            (channels[0], channels[1], channels[2]), chosen.latent_channels
        )
        data = ScenePictures(seed)
        quality_of = kind.autoencoder_quality
    with kind.kernels_as_matrices(model) if chosen.kernels else nullcontext():
        outcome = run.fit(
            model,
            data,
            chosen.training,
            kind.autoencoder_loss,
            evaluate=quality_of,
            num_evaluations=8,
            average=0.998,
            label=chosen.name,
        )
    model.eval()
    kind.normalise(model, data)
    model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        quality = {"loss": outcome.final_loss, **quality_of(model)}
    with new_folder(run.output) as folder:
        model.save_pretrained(folder)
        card = Card(
            name=chosen.name,
            num_parameters=_count(model),
            data=_drawn(
                _rows(chosen.training, data, outcome.steps),
                "clips" if chosen.video else "pictures",
            ),
            training=describe_run(outcome),
            quality=quality,
            recipe=asdict(chosen),
            sha256=weights_hash(folder),
        )
        card.save(folder / "card.json")
    return card


# The picture models.


def new_denoiser(chosen: PictureRecipe, autoencoder: Any) -> Denoiser:
    """The untrained model of a recipe around an autoencoder."""
    cells = chosen.size // 4
    if chosen.kind == "dit":
        from hasten.zoo.denoisers.dit import SceneDiT

        return SceneDiT(autoencoder, cells=cells, **chosen.shape)
    if chosen.kind == "unet":
        from hasten.zoo.denoisers.unet import SceneUNet

        return SceneUNet(autoencoder, cells=cells, **chosen.shape)
    from hasten.zoo.denoisers.video import SceneVideo

    return SceneVideo(autoencoder, **chosen.shape)


def load_autoencoder(folder: Path, *, video: bool) -> Any:
    """An autoencoder from its folder, fp32.

    Raises:
        HastenError: where there is none.
    """
    from diffusers import AutoencoderKL, AutoencoderKLLTXVideo

    try:
        cls = AutoencoderKLLTXVideo if video else AutoencoderKL
        return cls.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise HastenError(
            f"no autoencoder can be read from {folder} ({error}); train it first: "
            f"hasten train {folder.name}"
        ) from error


def _data(chosen: PictureRecipe) -> ScenePictures | SceneClips:
    seed = chosen.training.seed
    if chosen.kind == "video":
        return SceneClips(seed, size=chosen.size, frames=chosen.frames)
    return ScenePictures(seed, halved=chosen.halved, halved_from=chosen.halved_from)


def _train_denoiser(chosen: PictureRecipe, run: _Run) -> Card:
    from hasten.zoo.denoisers.base import denoiser_loss, denoiser_optimizers
    from hasten.zoo.denoisers.quality import sample_quality

    video = chosen.kind == "video"
    autoencoder = load_autoencoder(run.part(chosen.autoencoder), video=video)
    judge = load_judge(run.part("scenes-judge"))
    model = new_denoiser(chosen, autoencoder)
    quick = {**chosen.sampling, "num_inference_steps": 12}

    def evaluate(_: nn.Module) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            found = sample_quality(
                model.pipeline(), quick, num=min(32, chosen.judged), frames=chosen.frames
            )
        return {name: found[name] for name in ("attributes", "exact")}

    outcome = run.fit(
        model,
        _data(chosen),
        chosen.training,
        denoiser_loss,
        evaluate=evaluate,
        num_evaluations=4,
        average=chosen.average,
        optimizers_of=denoiser_optimizers,
        label=chosen.name,
    )
    return _export_denoiser(chosen, model, outcome, judge, run.output)


def _export_denoiser(
    chosen: PictureRecipe, model: Denoiser, outcome: Outcome, judge: Judge, output: Path
) -> Card:
    """Write the pipeline, its card and its grid; what is judged is what was written."""
    from diffusers import DiffusionPipeline

    from hasten.zoo.denoisers.quality import sample, sample_quality, save_grid

    video = chosen.kind == "video"
    # Transformers opens a text encoder in the type it was saved in, and Diffusers everything else
    # in fp32 unless told otherwise; fp32 here suits both.
    model.network.bfloat16()
    model.autoencoder.bfloat16()
    model.eval()
    texts = [text for text, _ in prompts(8 if video else 32, 1, frames=chosen.frames)]
    with new_folder(output) as folder:
        model.pipeline().save_pretrained(folder)
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
        quality = {"loss": outcome.final_loss} | sample_quality(
            pipeline, chosen.sampling, num=chosen.judged, frames=chosen.frames, judge=judge
        )
        save_grid(sample(pipeline, texts, chosen.sampling, seed=1), folder / GRID)
        card = PictureCard(
            name=chosen.name,
            num_parameters=sum(map(_count, (model.text_encoder, model.network, model.autoencoder))),
            data=_drawn(
                _rows(chosen.training, _data(chosen), outcome.steps),
                f"{'clips' if video else 'pictures'} with captions",
            ),
            training=describe_run(outcome),
            quality=quality,
            recipe=asdict(chosen),
            sha256=weights_hash(folder),
            sampling=chosen.sampling,
            grid=texts,
        )
        card.save(folder / "card.json")
    return card


def _rows(settings: Settings, data: ScenePictures | SceneClips, steps: int) -> int:
    """How many pictures or clips were seen in that many steps."""
    seen = 0
    for step in range(steps):
        length, index = settings.place(step)
        seen += data.layout(index, settings.batch_tokens // length, length)[0]
    return seen


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _drawn(num: int, what: str) -> dict[str, Any]:
    return {"source": "procedural scenes, drawn as they are needed", "num": num, "what": what}
