"""The picture models of the zoo: recipes, resuming, the pipelines that they write."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hasten.errors import HastenError
from hasten.training import Settings, Stage
from hasten.zoo import catalogue
from hasten.zoo import recipes as zoo
from hasten.zoo.denoisers import recipes
from hasten.zoo.denoisers.autoencoder import (
    autoencoder_quality,
    kernels_as_matrices,
    video_autoencoder_quality,
)
from hasten.zoo.denoisers.data import SceneClips, ScenePictures
from hasten.zoo.denoisers.quality import sample
from hasten.zoo.output import weights_hash
from hasten.zoo.scenes import compare, prompts, read

diffusers = pytest.importorskip("diffusers")

KINDS = ("dit", "unet", "video")
PIPELINES = {"dit": "CogView4Pipeline", "unet": "StableDiffusionPipeline", "video": "LTXPipeline"}


def settings(steps: int, tokens: int, *lengths: int) -> Settings:
    stages = tuple(Stage(length=length, share=1 / len(lengths)) for length in lengths)
    return Settings(
        tokens=steps * tokens,
        batch_tokens=tokens,
        stages=stages,
        matrix_lr=0.02,
        other_lr=5e-3,
        compile=False,
        autocast=False,
    )


JUDGE = recipes.JudgeRecipe(name="scenes-judge", widths=(8, 8, 8), training=settings(4, 8, 1))
VAE = recipes.AutoencoderRecipe(
    name="scenes-vae", widths=(8, 8, 8), training=settings(4, 256, 64, 256)
)
VIDEO_VAE = recipes.AutoencoderRecipe(
    name="scenes-video-vae",
    widths=(16,),
    video=True,
    kernels=True,
    training=settings(4, 512, 64, 512),
)
CALL = {"num_inference_steps": 3, "guidance_scale": 3.0}


def small(kind: str) -> recipes.PictureRecipe:
    """A recipe that runs in a second or two."""
    shape: dict[str, Any] = {"width": 32, "layers": 2, "heads": 1, "words_dim": 32}
    video = kind == "video"
    if kind == "unet":
        shape = {"widths": (16, 32), "heads": 1, "words_dim": 32}
    return recipes.PictureRecipe(
        name=f"small-{kind}",
        kind=kind,
        autoencoder="scenes-video-vae" if video else "scenes-vae",
        shape=shape,
        sampling={**CALL, "height": 32, "width": 32, "num_frames": 4} if video else CALL,
        size=32 if video else 64,
        frames=4 if video else 1,
        judged=4,
        average=0.9,
        training=settings(8, 512, 64, 256),
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoders and a judge, hardly trained."""
    folder = tmp_path_factory.mktemp("parts")
    for recipe in (JUDGE, VAE, VIDEO_VAE):
        recipes.train(recipe, folder / recipe.name, threads=1, quiet=True)
    return folder


@pytest.fixture(scope="module")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        recipes.train(small(kind), folder / kind, threads=1, quiet=True, parts=parts)
    return {kind: folder / kind for kind in KINDS}


def paint(folder: Path, kind: str, text: str = "a big red circle on dark ground") -> Tensor:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    result = pipeline(
        prompt=text,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **small(kind).sampling,
    )
    return torch.as_tensor(result.frames if kind == "video" else result.images)


# What recipes write.


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_pipeline_is_written(kind: str, trained: dict[str, Path]) -> None:
    folder = trained[kind]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == PIPELINES[kind]
    modules = {entry[0] for entry in index.values() if isinstance(entry, list) and entry[0]}
    assert modules <= {"diffusers", "transformers"}  # no class of ours, no remote code
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.py"))
    picture = paint(folder, kind)
    assert picture.shape == ((1, 4, 3, 32, 32) if kind == "video" else (1, 3, 64, 64))
    assert bool(picture.isfinite().all()) and float(picture.std()) > 0
    assert torch.equal(picture, paint(folder, kind))  # the seed decides
    assert not torch.equal(picture, paint(folder, kind, "a small blue square on light ground"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_says_what_was_done(kind: str, trained: dict[str, Path]) -> None:
    folder = trained[kind]
    card = json.loads((folder / "card.json").read_text())
    assert card["recipe"] == json.loads(json.dumps(asdict(small(kind))))
    assert card["sampling"] == small(kind).sampling
    assert card["training"]["steps"] == 8
    assert math.isfinite(card["quality"]["loss"])
    assert {"attributes", "exact", "count", "frechet", "frechet_of_real"} <= set(card["quality"])
    assert ("motion" in card["quality"]) == (kind == "video")
    assert len(card["grid"]) == (8 if kind == "video" else 32)
    assert 0 < (folder / recipes.GRID).stat().st_size < 150_000


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_and_batches(kind: str, trained: dict[str, Path]) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(trained[kind], dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    texts = ["a big red circle on dark ground", ""]
    result = pipeline(prompt=texts, output_type="pt", **small(kind).sampling)
    pictures = torch.as_tensor(result.frames if kind == "video" else result.images)
    assert len(pictures) == 2 and bool(pictures.isfinite().all())


def test_the_transformers_offer_what_techniques_need(trained: dict[str, Path]) -> None:
    from diffusers.hooks._helpers import TransformerBlockRegistry
    from diffusers.models.cache_utils import CacheMixin

    for kind in ("dit", "video"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(trained[kind])
        assert isinstance(pipeline.transformer, CacheMixin)
        block = pipeline.transformer.transformer_blocks[0]
        assert TransformerBlockRegistry.get(type(block)) is not None
        assert type(pipeline.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"


def test_the_dit_draws_two_sizes_and_takes_few_tokens(trained: dict[str, Path]) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(trained["dit"])
    pipeline.set_progress_bar_config(disable=True)
    half = pipeline("a red circle", height=32, width=32, output_type="pt", **CALL).images
    assert half.shape == (1, 3, 32, 32)
    # A caption is padded to 16 tokens, whatever its length and its neighbours in the batch.
    lengths = {
        pipeline.encode_prompt([text])[0].shape[1]
        for text in ("", "a big red circle", "a small hollow red square, " * 2 + "and dark")
    }
    assert lengths == {16}
    # Some tokens at their own positions, laid out as a picture one token wide.
    network = pipeline.transformer
    latents = torch.randn(2, 8, 16, 16)
    cosine, sine = network.rope(latents)
    kept = torch.randperm(256)[:100]
    size = torch.full((2, 2), 64.0)
    output = network(
        latents.flatten(2)[:, :, kept, None],
        pipeline.encode_prompt(["a", "b"])[0],
        torch.tensor([500.0, 500.0]),
        original_size=size,
        target_size=size,
        crop_coords=torch.zeros(2, 2),
        image_rotary_emb=(cosine[kept], sine[kept]),
    ).sample
    assert output.shape == (2, 8, 100, 1)


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_the_unet_takes_other_schedulers(scheduler: str, trained: dict[str, Path]) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(trained["unet"])
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    picture = pipeline("a red circle", output_type="pt", **CALL).images
    assert bool(picture.isfinite().all())


def test_autoencoders_have_latents_of_unit_variance(parts: Path) -> None:
    vae = recipes.load_autoencoder(parts / "scenes-vae", video=False)
    pictures = ScenePictures(5).batch(0, 32, 256).pictures
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor
    assert latents.shape == (32, 8, 16, 16)
    assert float(latents.std()) == pytest.approx(1, rel=0.1)
    clips = SceneClips(0).batch(0, 64, 512).pictures  # those that the figures come from
    video = recipes.load_autoencoder(parts / "scenes-video-vae", video=True)
    with torch.no_grad():
        codes = video.encode(clips).latent_dist.mode()
    assert codes.shape == (64, 8, 8, 8, 8)  # every frame is kept
    flat = codes.transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(dim=1), video.latents_mean, atol=0.05)
    assert torch.allclose(flat.std(dim=1), video.latents_std, rtol=0.05)


def test_kernels_are_matrices_for_the_time_being() -> None:
    """A convolution learns as a matrix, and is again itself afterwards."""
    torch.manual_seed(0)
    layer = torch.nn.Conv3d(3, 4, 2)
    before = layer.weight.detach().clone()
    noise = torch.randn(1, 3, 4, 4, 4)
    wanted = layer(noise)
    with kernels_as_matrices(torch.nn.Sequential(layer)):
        matrices = [parameter for parameter in layer.parameters() if parameter.ndim == 2]
        assert [parameter.shape for parameter in matrices] == [(4, 24)]
        assert torch.equal(layer(noise), wanted)
        optimizer = torch.optim.Muon(matrices, lr=0.1, weight_decay=0.0)
        layer(noise).square().sum().backward()
        optimizer.step()
        moved = layer.weight.detach() - before
    assert type(layer) is torch.nn.Conv3d and torch.equal(layer.weight - before, moved)
    # Muon's updates are nearly orthogonal matrices, whatever the gradient.
    assert torch.linalg.svdvals(moved.flatten(1) / 0.1) == pytest.approx(torch.ones(4), abs=0.4)


# Data.


def test_batches_are_functions_of_their_place() -> None:
    data = ScenePictures(1)
    first, again = data.batch(3, 4, 64), data.batch(3, 4, 64)
    assert torch.equal(first.pictures, again.pictures) and first.captions == again.captions
    assert first.pictures.shape == (4, 3, 32, 32) and float(first.pictures.min()) >= -1
    assert not torch.equal(first.pictures, data.batch(4, 4, 64).pictures)
    empty = sum(text == "" for i in range(20) for text in data.batch(i, 16, 64).captions)
    assert 10 < empty < 60  # about one of ten
    shapes = {
        tuple(ScenePictures(1, halved=0.5).batch(i, 2, 256).pictures.shape) for i in range(12)
    }
    assert shapes == {(2, 3, 64, 64), (8, 3, 32, 32)}
    clip, still = SceneClips(1).batch(0, 2, 512), SceneClips(1).batch(0, 2, 64)
    assert clip.pictures.shape == (2, 3, 8, 32, 32) and still.pictures.shape == (2, 3, 1, 32, 32)


# Running recipes.


def test_training_repeats_and_resumes(
    tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small("dit")

    def run(name: str, **more: Any) -> zoo.Card:
        return recipes.train(recipe, tmp_path / name, threads=1, quiet=True, parts=parts, **more)

    whole = run("whole")
    assert run("whole").sha256 == whole.sha256
    batch = ScenePictures.batch

    def interrupting(self: ScenePictures, index: int, rows: int, length: int) -> Any:
        if (length, index) == (256, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, index, rows, length)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ScenePictures, "batch", interrupting)
        run("cut")
    assert not (tmp_path / "cut").exists()
    assert run("cut", resume=True).sha256 == whole.sha256
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cut", "whole"]


def test_recipes_refuse(tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HastenError, match="give dit, unet or video"):
        replace(small("dit"), kind="gan")
    with pytest.raises(HastenError, match="no recipe named 'scenes'"):
        recipes.recipe("scenes")
    empty = tmp_path / "parts"
    with pytest.raises(HastenError, match="hasten train scenes-vae"):
        recipes.train(small("dit"), tmp_path / "model", quiet=True, parts=empty)
    with pytest.raises(HastenError, match="takes no techniques"):
        zoo.train(small("dit"), tmp_path / "model", plan="repr_align")
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    with pytest.raises(HastenError, match="is no zoo model"):
        recipes.train(small("dit"), tmp_path, quiet=True, parts=parts)
    monkeypatch.setattr(recipes, "find_spec", lambda name: None)
    with pytest.raises(HastenError, match=r"hasten\[diffusion\]"):
        recipes.train(small("dit"), tmp_path / "model", quiet=True, parts=parts)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["thesis.txt"]


def test_recipes_name_themselves_and_are_found() -> None:
    for name, recipe in recipes.RECIPES.items():
        assert recipe.name == name
        assert zoo.recipe(name) is recipe
    for kind in KINDS:
        full, tiny = (recipes.RECIPES[f"scenes-{kind}{end}"] for end in ("", "-tiny"))
        assert isinstance(full, recipes.PictureRecipe) and isinstance(tiny, recipes.PictureRecipe)
        assert full.kind == tiny.kind == kind
        assert max(stage.length for stage in full.training.stages) >= 256  # image tokens


# The catalogue.


def test_the_catalogue_knows_pipelines(
    tmp_path: Path, trained: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo" / "mine").symlink_to(trained["dit"])
    assert "mine" in catalogue.names() and catalogue.is_pipeline("mine")
    assert not catalogue.is_pipeline("code-lm")
    assert catalogue.card("mine")["sampling"] == CALL
    # Parts are found by name but are no models.
    part = tmp_path / "zoo" / "a-part"
    part.mkdir()
    (part / "card.json").write_text("{}")
    assert catalogue.part_path("a-part") == part and "a-part" not in catalogue.names()
    with pytest.raises(HastenError, match="hasten train no-part"):
        catalogue.part_path("no-part")


# The models that ship.

SHIPPED = ("scenes-dit", "scenes-unet", "scenes-video")
PARTS = ("scenes-judge", "scenes-vae", "scenes-video-vae")


def test_shipped_models_are_small() -> None:
    files = [file for name in SHIPPED for file in catalogue.path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40_000_000
    for name in SHIPPED:
        assert 2_000_000 < catalogue.card(name)["num_parameters"] < 8_000_000
        assert (catalogue.path(name) / recipes.GRID).stat().st_size < 150_000


@pytest.mark.parametrize("name", (*SHIPPED, *PARTS))
def test_shipped_cards_are_true(name: str) -> None:
    folder = catalogue.part_path(name)
    assert folder.parent == catalogue.SHIPPED
    card = json.loads((folder / "card.json").read_text())
    assert card["sha256"] == weights_hash(folder)
    assert card["recipe"] == json.loads(json.dumps(asdict(recipes.RECIPES[name])))


@pytest.mark.zoo
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_draw_what_they_are_told(name: str) -> None:
    card = catalogue.card(name)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(catalogue.path(name))
    frames = card["sampling"].get("num_frames", 1)
    num = 4 if frames > 1 else 8
    wanted = prompts(num, 5, frames=frames)
    pictures = sample(
        pipeline, [text for text, _ in wanted], {**card["sampling"], "num_inference_steps": 15}
    )
    stills = pictures if frames == 1 else pictures[:, 0]
    scenes = [scene for _, scene in wanted]
    right = [
        compare(one, two, relation=False).share
        for one, two in zip(read(stills), scenes, strict=True)
    ]
    others = [*scenes[1:], scenes[0]]
    wrong = [
        compare(one, two, relation=False).share
        for one, two in zip(read(stills), others, strict=True)
    ]
    assert sum(right) / num > 0.6 > 0.45 > sum(wrong) / num


@pytest.mark.zoo
def test_the_shipped_autoencoders_are_faithful() -> None:
    vae = recipes.load_autoencoder(catalogue.part_path("scenes-vae"), video=False)
    assert autoencoder_quality(vae, rows=16)["psnr_64"] > 31.5
    video = recipes.load_autoencoder(catalogue.part_path("scenes-video-vae"), video=True)
    assert video_autoencoder_quality(video, rows=8)["psnr"] > 32.5
