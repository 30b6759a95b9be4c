"""Opening Diffusers pipelines: what is accepted, what is said of them, what is refused and how."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import hasten
from hasten.denoise.engine import DenoiseModel
from hasten.errors import PlanError, SubjectError
from hasten.parts import model_hash
from hasten.subject import open_subject
from tests import models, pipelines
from tests.pipelines import call, picture, tiny

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
SLOTS = ["schedule", "gate", "guider", "block", "attention", "state"]


# --------------------------------------------------------------------------------------- accepted
@pytest.mark.parametrize("name", ["dit", "sd3", "unet", "wan"])
def test_a_folder_and_a_live_pipeline_say_what_they_are(name: str) -> None:
    folder, live = open_subject(pipelines.folder(name)), open_subject(tiny(name))
    network = folder.pipe.unet if name == "unet" else folder.pipe.transformer
    assert folder.engine == live.engine == "denoise"
    assert folder.model is network and not network.training
    found = folder.describe()
    assert found["kind"] == type(folder.pipe).__name__ == live.name
    assert found["slots"] == SLOTS
    assert found["parameters"] == sum(p.numel() for p in network.parameters())
    assert found["dtype"] == "float32" and found["context"] is None
    assert found["hash"] == live.hash == model_hash(network)
    made = picture(folder.pipe(**call(name)))
    assert torch.equal(made, picture(live.pipe(**call(name))))


def test_what_was_opened_is_opened_again() -> None:
    subject = open_subject(tiny("dit"))
    assert open_subject(subject) is subject


def test_the_dtype_that_is_asked_for_and_the_stored_one(tmp_path: Path) -> None:
    half = tiny("sd3", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert open_subject(tmp_path).describe()["dtype"] == "float32"  # on a CPU, by default
    stored = open_subject(tmp_path, dtype="stored")
    assert stored.describe()["dtype"] == "bfloat16"
    assert stored.pipe.vae.dtype == stored.pipe.text_encoder.dtype == torch.bfloat16
    assert open_subject(pipelines.folder("sd3"), dtype="stored").model.dtype == torch.float32
    asked = open_subject(pipelines.folder("sd3"), dtype="bfloat16")
    assert asked.model.dtype == torch.bfloat16
    assert picture(asked.pipe(**call("sd3"))).isfinite().all()
    with pytest.raises(SubjectError, match="a live model is not converted"):
        open_subject(half, dtype="float32")
    assert open_subject(half, dtype="bfloat16").pipe is half


def test_the_command_line_shows_a_pipeline_folder() -> None:
    from hasten.cli import app

    shown = CliRunner().invoke(app, ["show", str(pipelines.folder("dit")), "--json"])
    if shown.exit_code == 2:  # `show` is about techniques only
        return
    assert json.loads(shown.stdout)["engine"] == "denoise"


# ---------------------------------------------------------------------------------------- refused
def cut(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights.pop("context_embedder.bias")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def with_a_wrong_shape(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["context_embedder.bias"] = torch.zeros(3)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def renamed(folder: Path) -> None:
    (folder / WEIGHTS).rename((folder / WEIGHTS).with_suffix(".bin"))


def with_index(**entries: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "model_index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return write


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "no JSON": (lambda f: (f / "model_index.json").write_text("{"), "is not valid JSON"),
    "no object": (lambda f: (f / "model_index.json").write_text("[]"), "names no pipeline class"),
    "unknown class": (
        with_index(_class_name="NoSuchPipeline"),
        "names the pipeline NoSuchPipeline, which Diffusers .* does not have",
    ),
    "own code": (with_index(_class_name=["pipeline", "Mine"]), "which hasten does not run"),
    "unknown scheduler": (
        with_index(scheduler=["diffusers", "NoSuchScheduler"]),
        "NoSuchScheduler",
    ),
    "a part is missing": (lambda f: shutil.rmtree(f / "vae"), "has no folder vae"),
    "a damaged config": (lambda f: (f / "transformer/config.json").write_text("{"), "config.json"),
    "cut short": (cut, "damaged or cut short"),
    "cut short, text": (
        lambda f: (f / "text_encoder/model.safetensors").write_bytes(b"12345678"),
        "text_encoder/model.safetensors is damaged",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no .safetensors"),
    "another kind of weights": (renamed, "hasten loads no other kind"),
    "a weight is missing": (
        without_a_weight,
        "transformer lacks 1 of the weights .*, context_embedder.bias among them",
    ),
    "a wrong shape": (with_a_wrong_shape, r"expected shape torch.Size\(\[32\]\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder(damage: str, tmp_path: Path) -> None:
    damaging, said = DAMAGES[damage]
    shutil.copytree(pipelines.folder("sd3"), tmp_path / "sd3")
    damaging(tmp_path / "sd3")
    with pytest.raises(SubjectError, match=said) as raised:
        open_subject(tmp_path / "sd3")
    assert "\n" not in str(raised.value)


def test_pipelines_that_do_not_denoise() -> None:
    upsampler = diffusers.LTXLatentUpsamplePipeline(
        vae=tiny("ltx").vae,
        latent_upsampler=diffusers.pipelines.ltx.modeling_latent_upsampler.LTXLatentUpsamplerModel(
            in_channels=8, mid_channels=32, num_blocks_per_stage=1
        ),
    )
    with pytest.raises(SubjectError, match="LTXLatentUpsamplePipeline has no transformer"):
        open_subject(upsampler)
    pipe = tiny("dit")
    pipe.scheduler = None
    with pytest.raises(SubjectError, match="has no scheduler that makes steps"):
        open_subject(pipe)


def test_a_network_under_another_name() -> None:
    """A prior has the same loop; its network is known by being told the time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = diffusers.models.StableCascadeUNet(
            conditioning_dim=32,
            block_out_channels=(16, 16),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            switch_level=(False,),
            clip_image_in_channels=32,
            clip_text_in_channels=32,
            clip_text_pooled_in_channels=32,
            dropout=(0.0, 0.0),
            self_attn=False,
        )
    pipe = diffusers.StableCascadePriorPipeline(
        prior=prior.eval(),
        scheduler=diffusers.DDPMWuerstchenScheduler(),
        text_encoder=tiny("sd3").text_encoder,
        tokenizer=tiny("sd3").tokenizer,
        feature_extractor=None,
        image_encoder=None,
        resolution_multiple=8.0,
    )
    pipe.set_progress_bar_config(disable=True)
    assert open_subject(pipe).model is prior
    arguments = {"height": 128, "width": 128, "num_inference_steps": 6, "output_type": "pt"}

    def given() -> dict[str, Any]:
        return {"prompt": "a", "generator": torch.Generator().manual_seed(0), **arguments}

    expected = pipe(**given()).image_embeddings
    with hasten.apply(pipe, "") as fast:
        assert torch.equal(fast(**given()).image_embeddings, expected)
    assert fast.activity == {"calls": 6, "rows": 12, "steps": 6}


def test_diffusers_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipelines.folder("dit")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SubjectError, match=r"is not installed; pip install 'hasten\[diffusion\]'"):
        open_subject(folder)
    assert open_subject(models.tiny_model()).engine == "causal"  # the rest does without it


# ------------------------------------------------------------------------------------------ plans
def test_a_saved_plan_is_put_on_the_pipeline_again(tmp_path: Path) -> None:
    plan = "reuse_always"
    folder = pipelines.folder("sd3")
    with hasten.apply(folder, plan) as fast:
        fast.pipe.set_progress_bar_config(disable=True)
        made = picture(fast(**call("sd3", num_inference_steps=12)))
        hasten.save(fast, tmp_path)
    assert fast.activity["skipped"] > 0
    again = hasten.load(tmp_path, tiny("sd3"))
    assert isinstance(again, DenoiseModel) and str(again.plan) == str(fast.plan)
    assert torch.equal(picture(again(**call("sd3", num_inference_steps=12))), made)
    again.undo()


def test_techniques_of_other_engines_are_refused() -> None:
    with pytest.raises(PlanError, match=r"prompt_lookup is of the causal engine.*denoise one"):
        hasten.apply(tiny("dit"), "prompt_lookup")
    with pytest.raises(PlanError, match=r"reuse_always is of the denoise engine.*causal one"):
        hasten.apply(models.tiny_model(), "reuse_always")
    with pytest.raises(PlanError, match=r"saber is of the masked engine.*denoise one"):
        hasten.apply(tiny("dit"), "saber")


def test_a_runner_that_it_does_not_have() -> None:
    with pytest.raises(PlanError, match="native"):
        hasten.apply(tiny("dit"), "", runner="native")
