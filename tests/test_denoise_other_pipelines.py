"""Pipelines with pictures, control or frames beside the sample, and of other kinds of networks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import hasten
from hasten.denoise.engine import DenoiseModel
from hasten.errors import SubjectError
from tests.pipelines import (
    WIDTH,
    _clip,
    _clip_tokenizer,
    _t5,
    _t5_tokenizer,
    _vae,
    call,
    picture,
    tiny,
)

STEPS = 12
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
START: dict[str, Any] = {"image": IMAGE, "strength": 0.75}  # nine of twelve steps are made
FREE: dict[str, Any] = {"height": ..., "width": ...}
PAG: dict[str, Any] = {"pag_scale": 2.0}
CONTROL: dict[str, Any] = {"conditioning_embedding_out_channels": (8,)}  # of the latents' size

Made = tuple[Any, dict[str, Any]]
MAKERS: dict[str, Callable[[], Made]] = {}


def maker(make: Callable[[], Made]) -> Callable[[], Made]:
    """Register what makes a pipeline and the arguments of a call of it."""
    MAKERS[make.__name__.strip("_")] = make
    return make


def of(family: str, kind: str, given: dict[str, Any], **components: Any) -> Made:
    """A family's pipeline of another class, some of its parts exchanged."""
    pipe = tiny(family, kind=kind, **components)
    return pipe, call(family, **given)


def like(network: Any, **settings: Any) -> Any:
    """A network as another one but for some settings."""
    own = {key: value for key, value in network.config.items() if not key.startswith("_")}
    return type(network)(**{**own, **settings})


def frame(size: int = 16) -> Image.Image:
    pixels = (IMAGE[0].permute(1, 2, 0).numpy() * 255).astype("uint8")
    return Image.fromarray(pixels).resize((size, size))


# ---------------------------------------------------------------------- beside the sample a picture
@maker
def _inpaint_channels() -> Made:
    unet = like(tiny("unet").unet, in_channels=9)
    given = {**START, "mask_image": MASK}
    return of("unet", "StableDiffusionInpaintPipeline", given, unet=unet)


@maker
def _pix2pix() -> Made:
    unet = like(tiny("unet").unet, in_channels=8)
    given = {"image": IMAGE, "image_guidance_scale": 1.5, **FREE}
    return of("unet", "StableDiffusionInstructPix2PixPipeline", given, unet=unet)


@maker
def _cogview4_control() -> Made:
    network = like(tiny("cogview4").transformer, in_channels=8)
    given = {"control_image": IMAGE}
    return of("cogview4", "CogView4ControlPipeline", given, transformer=network)


@maker
def _flux_fill() -> Made:
    network = like(tiny("flux").transformer, in_channels=36, out_channels=16)
    given = {"image": IMAGE, "mask_image": MASK}
    return of("flux", "FluxFillPipeline", given, transformer=network)


@maker
def _wan_begins_with_a_picture() -> Made:
    network = like(tiny("wan").transformer, in_channels=12)
    given = {**_read("wan"), "image": frame()}
    return of("wan", "WanImageToVideoPipeline", given, transformer=network)


@maker
def _ltx_begins_with_a_picture() -> Made:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return of("ltx", "LTXImageToVideoPipeline", {"image": image})


# ----------------------------------------------------------------------------- a network of control
@maker
def _unet_controlnet() -> Made:
    control = diffusers.ControlNetModel.from_unet(tiny("unet").unet, **CONTROL)
    return of("unet", "StableDiffusionControlNetPipeline", {"image": IMAGE}, controlnet=control)


@maker
def _sd3_controlnet() -> Made:
    control = diffusers.SD3ControlNetModel.from_transformer(
        tiny("sd3").transformer, num_layers=1, num_extra_conditioning_channels=0
    )
    given = {"control_image": IMAGE}
    return of("sd3", "StableDiffusion3ControlNetPipeline", given, controlnet=control)


@maker
def _flux_controlnet() -> Made:
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    control = diffusers.FluxControlNetModel.from_transformer(
        tiny("flux").transformer, attention_head_dim=16, **sizes
    )
    return of("flux", "FluxControlNetPipeline", {"control_image": IMAGE}, controlnet=control)


# --------------------------------------------------------- a third branch, or a picture to begin with
@maker
def _unet_third_branch() -> Made:
    return of("unet", "StableDiffusionPAGPipeline", PAG, pag_applied_layers=["mid"])


@maker
def _sd3_third_branch() -> Made:
    return of("sd3", "StableDiffusion3PAGPipeline", PAG, pag_applied_layers=["blocks.1"])


@maker
def _chroma_img2img() -> Made:
    return of("chroma", "ChromaImg2ImgPipeline", START)


@maker
def _qwenimage_img2img() -> Made:
    return of("qwenimage", "QwenImageImg2ImgPipeline", START)


@maker
def _sdxl_inpaint() -> Made:
    return of("sdxl", "StableDiffusionXLInpaintPipeline", {**START, "mask_image": MASK})


@maker
def _wan_video2video() -> Made:
    given = {**_read("wan"), "video": [frame()] * 5, "strength": 0.75, "num_frames": ...}
    return of("wan", "WanVideoToVideoPipeline", given)


def _read(family: str) -> dict[str, Any]:
    """Prompts as embeddings, for pipelines that would clean them by a library that is not here."""
    found = tiny(family).encode_prompt("a red circle", "blurred", max_sequence_length=16)
    embeds = dict(zip(("prompt_embeds", "negative_prompt_embeds"), found, strict=True))
    return {"prompt": ..., "negative_prompt": ..., **embeds}


# -------------------------------------------------------------------------------- other networks
@maker
def _pixart_alpha() -> Made:
    return of("pixart", "PixArtAlphaPipeline", {})


@maker
def _motion() -> Made:
    """A U-Net for pictures, with layers between that read along the frames."""
    adapter = diffusers.MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    pipe = diffusers.AnimateDiffPipeline(
        unet=tiny("unet").unet,
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        motion_adapter=adapter,
    )
    return pipe, call("unet", num_frames=3)


@maker
def _frames_as_rows() -> Made:
    """Its scheduler is given frames where its network is given clips."""
    unet = diffusers.UNet3DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    pipe = diffusers.TextToVideoSDPipeline(
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vae=_vae(),
        text_encoder=_clip(),
        tokenizer=_clip_tokenizer(),
    )
    return pipe, call("unet", num_frames=3)


@maker
def _pixels() -> Made:
    """Has no autoencoder, and puts out a variance too."""
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        in_channels=3,
        out_channels=6,
        cross_attention_dim=WIDTH,
        encoder_hid_dim=WIDTH,
        attention_head_dim=4,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=4,
    )
    pipe = diffusers.IFPipeline(
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
        unet=unet,
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range"),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    return pipe, call("unet", clean_caption=False)


@maker
def _prior() -> Made:
    """Makes one vector, by a network whose output has another name."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        image_size=32,
        projection_dim=WIDTH,
        intermediate_size=32,
        num_attention_heads=4,
        num_hidden_layers=1,
        patch_size=16,
    )
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=12, embedding_dim=WIDTH, num_layers=2
    )
    nn.init.ones_(prior.clip_std)
    pipe = diffusers.KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        text_encoder=_clip(projection=True),
        tokenizer=_clip_tokenizer(),
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        image_processor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )
    return pipe, {**call("unet"), "negative_prompt": ...}


@cache
def made_by(name: str) -> tuple[Any, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, arguments = MAKERS[name]()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(type(pipe).__call__).parameters
    wanted = {key: value for key, value in arguments.items() if key in known and value is not ...}
    return pipe, {**wanted, "num_inference_steps": STEPS}


def drawn(name: str, plan: str | None) -> tuple[Tensor, dict[str, int]]:
    """What a pipeline makes with a plan, or by itself, and what the plan counted."""
    pipe, arguments = made_by(name)
    given = {**arguments, "generator": torch.Generator().manual_seed(0)}
    torch.manual_seed(0)  # some draw what they code their pictures to without the call's generator
    if plan is None:
        return picture(pipe(**given)), {}
    with hasten.apply(pipe, plan) as fast:
        assert isinstance(fast, DenoiseModel)
        return picture(fast(**given)), dict(fast.activity)


@cache
def plain(name: str) -> Tensor:
    return drawn(name, None)[0]


BEGUN = (
    "inpaint_channels",
    "chroma_img2img",
    "qwenimage_img2img",
    "sdxl_inpaint",
    "wan_video2video",
)
NO_BLOCKS = (
    "inpaint_channels",
    "pix2pix",
    "unet_controlnet",
    "unet_third_branch",
    "sdxl_inpaint",
    "motion",
    "frames_as_rows",
    "pixels",
)
# Guided by no branch; by a third one; or not by one scale for the whole of what the network makes.
UNGUIDED = ("flux_fill", "flux_controlnet")
OTHERWISE = (
    "pix2pix",
    "unet_third_branch",
    "sd3_third_branch",
    "frames_as_rows",
    "ltx_begins_with_a_picture",
)


@pytest.mark.parametrize("name", MAKERS)
def test_an_empty_plan_changes_nothing(name: str) -> None:
    made, counted = drawn(name, "")
    assert torch.equal(made, plain(name))
    assert counted["steps"] == (9 if name in BEGUN else STEPS) and set(counted) == {
        "calls",
        "rows",
        "steps",
    }


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("plan", ["zeus", "easy_cache(threshold=9.0)"])
def test_gates(name: str, plan: str) -> None:
    made, counted = drawn(name, plan)
    assert counted["skipped"] > 0 and not torch.equal(made, plain(name))
    assert made.shape == plain(name).shape and bool(made.isfinite().all())


@pytest.mark.parametrize("name", MAKERS)
def test_a_guider(name: str) -> None:
    """It leaves branches out, or it does nothing: a third branch is none of its own."""
    made, counted = drawn(name, "adaptive_guidance(threshold=-1.0)")
    if name in UNGUIDED or name in OTHERWISE:
        assert torch.equal(made, plain(name)) and "left_out" not in counted
        return
    assert counted["left_out"] == counted["steps"] - 1 and counted["rows"] == counted["steps"] + 1
    assert bool(made.isfinite().all()) and not torch.equal(made, plain(name))


@pytest.mark.parametrize("name", MAKERS)
def test_blocks(name: str) -> None:
    if name in NO_BLOCKS:
        with pytest.raises(SubjectError, match="delta_dit works on transformer blocks"):
            drawn(name, "delta_dit")
        return
    made, counted = drawn(name, "delta_dit")
    assert counted["delta_dit.reused"] > 0
    assert bool(made.isfinite().all()) and not torch.equal(made, plain(name))


@pytest.mark.parametrize("name", ["inpaint_channels", "cogview4_control", "motion"])
def test_the_residual_branch_speaks_of_the_sample_alone(name: str) -> None:
    """A network that is given a mask or a picture too says noise of the sample only."""
    made, counted = drawn(name, "stream_diffusion")
    assert counted["left_out"] == counted["steps"] - 1
    assert made.shape == plain(name).shape and bool(made.isfinite().all())


REFUSED = {
    ("flux_controlnet", "just_in_time"): "adds to all of them; use its pipeline without control",
    ("sd3_controlnet", "just_in_time"): "adds to all of them; use its pipeline without control",
    ("ltx_begins_with_a_picture", "just_in_time"): "takes pipelines where both are one sample",
    ("ltx_begins_with_a_picture", "bottleneck_sampling"): "where both are one sample",
    ("frames_as_rows", "bottleneck_sampling"): "takes pipelines where both are one sample",
    ("cogview4_control", "rollover_budget_forcing"): "it is given pictures beside the sample",
    ("wan_begins_with_a_picture", "bottleneck_sampling"): "is given pictures beside the sample",
    ("sd3_third_branch", "rollover_budget_forcing"): "guide by no third branch",
    ("prior", "sada"): "adds noise on the way",
}


@pytest.mark.parametrize(("name", "plan"), REFUSED)
def test_what_cannot_run_is_refused_in_one_line(name: str, plan: str) -> None:
    with pytest.raises(hasten.errors.HastenError) as caught:
        drawn(name, plan)
    words = str(caught.value)
    assert REFUSED[name, plan] in words and plan in words and "\n" not in words


@pytest.mark.parametrize("plan", ["bottleneck_sampling", "just_in_time(sigmas=beta)"])
def test_a_way_that_begins_late_goes_by_its_own_levels(plan: str) -> None:
    """This pipeline does not tell its scheduler where the way begins; the plan's new grid must."""
    pipe, arguments = made_by("wan_video2video")
    with hasten.apply(pipe, plan) as fast:
        assert isinstance(fast, DenoiseModel)
        run = fast.start()
        run.trace = []
        fast._execute(run, **arguments)
    assert run.first == 3 and len(run.trace) == 9
    assert pipe.scheduler.step_index == 12  # the solver walked the last nine of its levels
    for step in run.trace:
        time = float(pipe.scheduler.timesteps[3 + step.index])
        assert float(step.timestep) == time


def test_a_pipeline_that_looks_into_its_network_needs_all_of_it() -> None:
    pipe, arguments = of("unet", "StableDiffusionSAGPipeline", {"sag_scale": 0.75})
    arguments["num_inference_steps"] = STEPS
    expected = picture(pipe(**{**arguments, "generator": torch.Generator().manual_seed(0)}))
    for plan in ("zeus", "adaptive_guidance", "grat", "stream_diffusion"):
        with pytest.raises(SubjectError, match=f"{plan} .*looks into its network's attention"):
            hasten.apply(pipe, plan)
    given = {**arguments, "num_inference_steps": 2 * STEPS}
    with hasten.apply(pipe, "fewer_steps(share=0.5)") as fast:
        made = picture(fast(**{**given, "generator": torch.Generator().manual_seed(0)}))
    assert torch.equal(made, expected)
