"""Bad input to the denoise engine: one clear line, exit code 2, nothing half-written, no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hasten
from hasten.denoise.network import networks
from hasten.errors import HastenError, SubjectError
from tests import pipelines
from tests.pipelines import call, picture, tiny
from tests.refusals import refused, refused_by_the_program

ROOT = Path(__file__).parent.parent
QUICK: dict[str, Any] = {"pictures": 1, "rounds": 5, "runner": "eager", "record": False}


def bench(pipe: Any, *plan: str, **options: Any) -> dict[str, Any]:
    return hasten.bench(pipe, *plan, **QUICK | options).to_dict()


def refusal(pipe: Any, *plan: str, **options: Any) -> str:
    """What a benchmark says before any step of the network is made."""
    calls: list[Any] = []
    handles = [
        network.register_forward_pre_hook(lambda *given: calls.append(given))
        for network in networks(pipe)
    ]
    with pytest.raises(HastenError) as caught:
        bench(pipe, *plan, **options)
    for handle in handles:
        handle.remove()
    assert "\n" not in str(caught.value) and not calls
    return str(caught.value)


# ----------------------------------------------------------------------------------- folders
def cut(folder: Path) -> None:
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def renamed(**entries: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return write


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "scheduler": (renamed(scheduler=["diffusers", "NoSuchScheduler"]), "NoSuchScheduler"),
    "pipeline class": (renamed(_class_name="NoSuchPipeline"), "NoSuchPipeline"),
    "own code": (renamed(_class_name=["mine", "Mine"]), "asks for code of its own"),
    "cut short": (cut, "is damaged or cut short"),
    "no pipeline": (emptied, "holds no config.json (or a pipeline's model_index.json)"),
    "no JSON": (lambda f: (f / "model_index.json").write_text("{"), "is not valid JSON"),
    "no part": (lambda f: shutil.rmtree(f / "vae"), "has no folder vae"),
}


@pytest.mark.parametrize("damage", FOLDERS)
@pytest.mark.parametrize("verb", ["bench", "generate", "prepare"])
def test_bad_folder(home: Path, damage: str, verb: str) -> None:
    damaging, words = FOLDERS[damage]
    folder = Path(shutil.copytree(pipelines.folder("sd3"), home / "pipe"))
    damaging(folder)
    Path("prompts.txt").write_text("a\n")
    plan = "harmonica" if verb == "prepare" else "zeus"
    more = {"generate": ["--prompt", "a"], "prepare": ["--text", "prompts.txt"]}.get(verb, [])
    assert words in refused(home, verb, str(folder), "--with", plan, *more)


def test_the_program_itself(tmp_path: Path) -> None:
    arguments = ["generate", str(pipelines.folder("unet")), "--with", "delta_dit", "--prompt", "a"]
    line = refused_by_the_program(tmp_path, *arguments)
    assert line.startswith("error: delta_dit works on transformer blocks")


# ------------------------------------------------------------------ what a technique needs
@pytest.mark.parametrize("plan", ["delta_dit", "harmonica", "random_block_reuse", "just_in_time"])
def test_a_network_without_blocks(plan: str, home: Path) -> None:
    """It is said before anything is trained or run."""
    words = refusal(tiny("unet"), plan)
    assert plan in words and "UNet2DConditionModel" in words
    assert not list(home.rglob("*.safetensors"))
    with pytest.raises(SubjectError, match="UNet2DConditionModel"):
        hasten.apply(tiny("unet"), plan)
    with pytest.raises(SubjectError, match="UNet2DConditionModel"):
        hasten.prepare(tiny("unet"), "harmonica", prompts=["a"])


def test_a_pipeline_that_is_no_flow() -> None:
    words = refusal(tiny("dit"), "rollover_budget_forcing")
    assert "searches along flows" in words and "DDIMScheduler" in words


def test_a_pipeline_without_a_network() -> None:
    pipe = tiny("sd3")
    pipe.transformer = None
    with pytest.raises(SubjectError, match="has no transformer or transformer_2 or unet"):
        hasten.bench(pipe, "zeus", **QUICK)


@pytest.mark.parametrize(
    ("family", "guidance"),
    [("sd3", 1.0), ("flux", 3.0)],  # guidance that is off; and a network that has learned it
)
def test_without_guidance_there_is_nothing_to_leave_out(family: str, guidance: float) -> None:
    """No error: the plan runs, and the benchmark says that it did nothing and why."""
    arguments = {"height": 16, "width": 16, "max_sequence_length": 16}
    data = bench(tiny(family), "adaptive_guidance", steps=3, guidance=guidance, arguments=arguments)
    (row,) = data["rows"]
    assert row["verdict"] == "inactive" and row["ceiling"] == 1.0
    assert "adaptive_guidance did nothing" in row["reason"] and "guidance is none" in row["reason"]
    assert row["quality"]["psnr"]["value"] == 100.0


def test_a_runner_that_a_technique_does_not_run_on(home: Path) -> None:
    words = refusal(tiny("dit"), "grat", runner="compiled")
    assert "grat does not run on the 'compiled' runner; it runs on: eager" in words
    folder = str(pipelines.folder("dit"))
    line = refused(
        home, "generate", folder, "--with", "grat", "--prompt", "5", "--runner", "compiled"
    )
    assert "grat does not run on the 'compiled' runner" in line


@pytest.mark.parametrize(
    "scheduler", ["CMStochasticIterativeScheduler", "DPMSolverMultistepInverseScheduler"]
)
@pytest.mark.parametrize("plan", ["bottleneck_sampling", "auto_diffusion"])
def test_a_scheduler_that_cannot_be_given_other_timesteps(scheduler: str, plan: str) -> None:
    """It has noise levels, but none can be written for timesteps that are not its own."""
    words = refusal(tiny("dit", scheduler=scheduler), plan)
    assert f"{plan}: {scheduler} cannot be given other timesteps; use DDIM" in words


NOISE_LEVELS = {
    "adaptive_guidance": "goes by noise levels",
    "stream_diffusion": "goes by noise levels",
    "just_in_time": "goes by noise levels",
    "dual_fast": "does not know the first-order term of",
    "sada": "has none",
    "bottleneck_sampling": "cannot be given other timesteps",
    "rollover_budget_forcing": "searches along flows",
}


@pytest.mark.parametrize("plan", NOISE_LEVELS)
def test_a_scheduler_that_is_known_to_none(plan: str) -> None:
    """Before any call; what does not go by levels runs."""
    words = refusal(tiny("dit", scheduler="EDMEulerScheduler"), plan)
    assert plan in words and NOISE_LEVELS[plan] in words and "EDMEulerScheduler" in words
    assert "; use " in words or "is of none" in words


@pytest.mark.parametrize("plan", ["zeus", "easy_cache(threshold=9.0)", "delta_dit", "fewer_steps"])
def test_what_needs_no_noise_levels_runs_with_any_scheduler(plan: str) -> None:
    for scheduler in ("EDMEulerScheduler", "KDPM2AncestralDiscreteScheduler", "IPNDMScheduler"):
        pipe = tiny("dit", scheduler=scheduler)
        with hasten.apply(pipe, plan) as fast:
            made = picture(fast(**call("dit", num_inference_steps=12)))
            assert len(fast.activity) > 3
        assert bool(made.isfinite().all())


BEGINS_WITH_A_PICTURE = {
    ("sd3_img2img", "rollover_budget_forcing"): "use its text-to-image pipeline",
    ("sd3_inpaint", "rollover_budget_forcing"): "use its text-to-image pipeline",
    ("sd3_inpaint", "bottleneck_sampling"): "puts pictures of the sample's size into its loop",
    ("unet_inpaint", "bottleneck_sampling"): "puts pictures of the sample's size into its loop",
    ("unet_img2img", "delta_dit"): "delta_dit works on transformer blocks",
    ("unet_inpaint", "just_in_time"): "just_in_time leaves tokens out of transformer blocks",
}


@pytest.mark.parametrize(("family", "plan"), BEGINS_WITH_A_PICTURE)
def test_pipelines_that_begin_with_a_picture_refuse_in_one_line(family: str, plan: str) -> None:
    with pytest.raises(SubjectError) as caught:
        hasten.apply(tiny(family), plan)
    words = str(caught.value)
    assert BEGINS_WITH_A_PICTURE[family, plan] in words and "\n" not in words and plan in words


@pytest.mark.parametrize("family", ["sd3_img2img", "sd3_inpaint", "flux_inpaint", "unet_inpaint"])
@pytest.mark.parametrize("plan", ["zeus", "sada", "dual_fast", "adaptive_guidance(threshold=-1)"])
def test_what_runs_on_them_makes_a_picture_of_that_size(family: str, plan: str) -> None:
    more = {"num_inference_steps": 16}
    whole = picture(tiny(family)(**call(family, **more)))
    with hasten.apply(tiny(family), plan) as fast:
        made = picture(fast(**call(family, **more)))
        counted = dict(fast.activity)
    assert made.shape == whole.shape and bool(made.isfinite().all()) and counted["steps"] == 12
    guided = not family.startswith("flux")
    assert torch.equal(made, whole) == (plan.startswith("adaptive") and not guided)


# ------------------------------------------------------------------------------ step counts
@pytest.mark.parametrize("steps", [0, -3, True, 2.5, 1001, 10**12])
def test_a_number_of_steps_that_is_none(steps: Any) -> None:
    words = refusal(tiny("sd3"), "zeus", steps=steps)
    assert f"num_inference_steps={steps!r} is out of range" in words and "1 to 1000" in words


def test_fewer_steps_than_a_technique_needs(home: Path) -> None:
    with pytest.raises(HastenError, match="bottleneck_sampling needs at least 3 steps"):
        bench(tiny("sd3"), "bottleneck_sampling", steps=2)
    words = refusal(tiny("sd3"), "harmonica", steps=1)
    assert "harmonica: steps=1 is out of range; allowed is 2" in words
    assert not list(home.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "plan",
    [
        "zeus",
        "easy_cache",
        "sada",
        "adaspa(first=40)",
        "adaptive_guidance",
        "delta_dit(interval=2)",
        "just_in_time",
        "dual_fast",
    ],
)
def test_too_few_steps_to_skip_any_is_inactive(plan: str) -> None:
    steps = 2 if plan in ("zeus", "easy_cache", "sada") else 1
    (row,) = bench(tiny("sd3"), plan, steps=steps, quality=False)["rows"]
    plan = plan.partition("(")[0]
    assert row["verdict"] == "inactive" and f"{plan} did nothing" in row["reason"]


# -------------------------------------------------------------------------------- arguments
ARGUMENTS: list[tuple[str, dict[str, Any], str]] = [
    ("sd3", {"height": 17}, "refuses this call: height and width have to be divisible by 2"),
    ("wan", {"height": 24, "num_frames": 5}, "height and width have to be divisible by 16"),
    ("unet", {"height": 16, "width": 20}, "height and width have to be divisible by 8"),
    # Where a pipeline rounds a size, or takes no notice of it, another one would be measured.
    ("unet", {"width": 20}, "makes a width of 16 where 20 is asked for"),
    ("flux", {"height": 17, "width": 16, "max_sequence_length": 16}, "makes a height of 16"),
    ("sd3", {"height": 0}, "height=0; it must be a whole number of 1 or more"),
    ("sd3", {"height": -16}, "height=-16"),
    ("sd3", {"height": "16"}, "height='16'"),
    ("wan", {"num_frames": 2.5}, "num_frames=2.5"),
    ("sd3", {"heigth": 16}, "takes no argument 'heigth'. Did you mean height?"),
    ("sd3", {"num_inference_steps": 4}, "sets the argument 'num_inference_steps' itself"),
    ("sd3", {"prompt": "a"}, "from the prompts; leave it out"),
    ("sd3", {"generator": None}, "from the seed"),
    ("sd3", {"max_sequence_length": 10**6}, "refuses this call: max_sequence_length"),
    ("sd3", {"guidance_scale": "high"}, "refuses this call"),
]


@pytest.mark.parametrize(("family", "arguments", "words"), ARGUMENTS)
def test_bad_argument(family: str, arguments: dict[str, Any], words: str, home: Path) -> None:
    with pytest.raises(HastenError) as caught:
        bench(tiny(family), "reuse_always", steps=2, arguments=arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (home / "home" / "parts").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pictures": 0}, "pictures=0"),
        ({"rounds": 2}, "rounds=2"),
        ({"guidance": float("nan")}, "guidance=nan"),
        ({"guidance": float("inf")}, "guidance=inf"),
        ({"threads": 0}, "threads=0"),
        ({"runner": "native"}, "not one of auto"),
    ],
)
def test_bad_option(options: dict[str, Any], words: str) -> None:
    assert words in refusal(tiny("sd3"), "zeus", **options)


def test_guidance_of_a_pipeline_that_has_none() -> None:
    words = refusal(tiny("ddpm"), "zeus", guidance=3.0)
    assert "DDPMPipeline takes no guidance_scale" in words
    assert "takes neither a prompt nor class_labels" in refusal(tiny("ddpm"), "zeus")


def test_a_class_that_there_is_not() -> None:
    pipe = tiny("dit")
    for prompt in ("a red circle", "1000", "-1"):
        words = refusal(pipe, "zeus", prompts=[prompt])
        assert f"{prompt!r} is no class of this DiTPipeline; give a number from 0 to 999" in words


def test_arguments_of_pipelines_do_not_go_with_text(tiny_checkpoint: Path) -> None:
    with pytest.raises(HastenError, match="is for Diffusers pipelines"):
        hasten.bench(tiny_checkpoint, "prompt_lookup", arguments={"height": 16}, record=False)


# ------------------------------------------------------------------------- the command line
SD3 = [
    (["--argument", "height=17", "--argument", "width=16"], "divisible by 2"),
    (["--argument", "heigth=16"], "Did you mean height?"),
    (["--argument", "height"], "is not NAME=VALUE"),
    (["--argument", "height=16", "--argument", "height=32"], "given twice"),
    (["--steps", "0"], "--steps is 0"),
    (["--steps", "100000000"], "out of range"),
    (["--guidance", "nan"], "guidance=nan"),
    (["--with", "medusa"], "medusa"),
    (["--with", "reuse_always, easy_cache"], "slot 'gate'"),
    (["--seed", "-1"], "--seed"),
]


@pytest.mark.parametrize(("arguments", "words"), SD3)
@pytest.mark.parametrize("verb", ["bench", "generate"])
def test_bad_call(home: Path, verb: str, arguments: list[str], words: str) -> None:
    given = [] if "--with" in arguments else ["--with", "fewer_steps"]
    given += ["--prompt", "a"] if verb == "generate" else ["--no-record"]
    assert words in refused(home, verb, str(pipelines.folder("sd3")), *given, *arguments)


@pytest.mark.parametrize(
    ("output", "words"),
    [("a.txt", "ends in .png or .gif"), (".", "ends in .png or .gif"), ("a.png/b.png", "write")],
)
def test_bad_output(home: Path, output: str, words: str) -> None:
    Path("a.png").write_bytes(b"")
    folder = str(pipelines.folder("dit"))
    arguments = ["--with", "zeus", "--prompt", "5", "--output", output]
    assert words in refused(home, "generate", folder, *arguments)


def test_pictures_of_language_models(home: Path, tiny_checkpoint: Path) -> None:
    given = ["generate", str(tiny_checkpoint), "--prompt", "a"]
    assert "--output is for pictures" in refused(home, *given, "--output", "a.png")
    assert "--guidance is for Diffusers pipelines" in refused(home, *given, "--guidance", "2")
    assert "--argument is for" in refused(home, *given, "--argument", "height=2")
