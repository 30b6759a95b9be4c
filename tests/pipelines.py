"""Tiny random Diffusers pipelines for tests, saved to disk and loaded again. Nothing is downloaded."""

from __future__ import annotations

import inspect
import string
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase, T5Tokenizer

from tests.models import tiny_tokenizer

# Nothing that these say is about a test.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

WIDTH = 32  # of every text encoder
GAIN = 2.0  # makes a random network's output depend clearly on its text and its tokens
PROMPT, NEGATIVE = "a red circle", "blurred"

Components = dict[str, Any]
Builder = Callable[[], Components]

FAMILIES: dict[str, tuple[str, Builder]] = {}
"""The pipeline's class and what makes its components, by family."""


VARIANTS = {
    "sd3_img2img": ("sd3", "StableDiffusion3Img2ImgPipeline"),
    "sd3_inpaint": ("sd3", "StableDiffusion3InpaintPipeline"),
    "flux_img2img": ("flux", "FluxImg2ImgPipeline"),
    "flux_inpaint": ("flux", "FluxInpaintPipeline"),
    "unet_img2img": ("unet", "StableDiffusionImg2ImgPipeline"),
    "unet_inpaint": ("unet", "StableDiffusionInpaintPipeline"),
    "sdxl_img2img": ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
}
"""Pipelines that start from a picture: the family that they are of, and their class."""


def family(name: str, kind: str) -> Callable[[Builder], Builder]:
    """Register the components of a family."""

    def register(build: Builder) -> Builder:
        FAMILIES[name] = (kind, build)
        return build

    return register


def tiny(
    name: str, *, kind: str | None = None, dtype: torch.dtype | None = None, **components: Any
) -> Any:
    """A random pipeline of a family, loaded from disk, in eval mode; the same each time.

    Args:
        name: of a family, or one of the variants that start from a picture.
        kind: another pipeline class that takes the same components.
        components: put in the place of the family's own; a scheduler may be given by its class's
            name, and is then made from the config of the family's.
    """
    if name in VARIANTS:
        name, kind = VARIANTS[name]
    options = {} if dtype is None else {"torch_dtype": dtype}
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder(name), local_files_only=True, **options
    )
    scheduler = components.pop("scheduler", None)
    if isinstance(scheduler, str):
        scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    components |= {} if scheduler is None else {"scheduler": scheduler}
    if kind is not None:
        chosen = getattr(diffusers, kind)
        taken = inspect.signature(chosen.__init__).parameters
        have = {key: value for key, value in pipe.components.items() if key in taken}
        pipe = chosen(**{**have, **components})
    else:
        for key, value in components.items():
            pipe.register_modules(**{key: value})
    for value in pipe.components.values():
        if isinstance(value, nn.Module):
            value.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def folder(name: str) -> Path:
    """The folder of a family's pipeline, as `save_pretrained` writes it; made once a process."""
    path = Path(_scratch().name) / name
    save(path, name)
    return path


def save(path: Path, name: str) -> Path:
    """Write a family's pipeline into a folder."""
    kind, build = FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = getattr(diffusers, kind)(**build())
    for network in (getattr(pipe, "transformer", None), getattr(pipe, "unet", None)):
        for weight in () if network is None else network.parameters():
            if weight.ndim == 2:
                weight.data *= GAIN
    pipe.save_pretrained(path)
    return path


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hasten-pipelines-")


def call(name: str, *, seed: int = 0, **more: Any) -> dict[str, Any]:
    """Cheap arguments for a call of a family's pipeline; `more` adds to them or changes them.

    Four steps with guidance, output as tensors. Everything is new in each call of this function,
    also the generator.
    """
    arguments: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(seed),
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "output_type": "pt",
        **_TEXT,
        **_CALLS.get(VARIANTS.get(name, (name,))[0], {}),
        **(_picture(name) if name in VARIANTS else {}),
        **more,
    }
    return {key: value for key, value in arguments.items() if value is not ...}


def _picture(name: str) -> dict[str, Any]:
    """What a pipeline is given that starts from a picture; six of eight steps are made."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    given: dict[str, Any] = {"image": image, "strength": 0.75, "num_inference_steps": 8}
    if name.endswith("inpaint"):
        given["mask_image"] = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
    elif not name.startswith("flux") and not name.startswith("sd3"):
        given |= _NO_SIZE
    return given


def picture(result: Any) -> torch.Tensor:
    """The tensor in a pipeline's output, of pictures or of clips."""
    made = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    return torch.as_tensor(made)


# What a call needs beside or instead of the usual; an ellipsis takes an argument away.
_TEXT = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "height": 16, "width": 16}
_NO_SIZE = {"height": ..., "width": ...}
_SHORT = {"max_sequence_length": 16}
_CLIP = {"num_frames": 5, **_SHORT}
_CALLS: dict[str, dict[str, Any]] = {
    "dit": {
        "class_labels": [7],
        "prompt": ...,
        "negative_prompt": ...,
        **_NO_SIZE,
        "output_type": "np",
    },
    "sd3": _SHORT,
    "flux": {"negative_prompt": ..., **_SHORT},
    "pixart": {"use_resolution_binning": False, "clean_caption": False, **_SHORT},
    "sana": {
        "use_resolution_binning": False,
        "clean_caption": False,
        "complex_human_instruction": None,
        "height": 32,
        "width": 32,
        **_SHORT,
    },
    "cogview4": _SHORT,
    "wan": _CLIP,
    "cogvideox": {**_CLIP, "height": 8, "width": 8},
    "ltx": {**_CLIP, "height": 32, "width": 32, "num_frames": 9},
    "auraflow": _SHORT,
    "chroma": _SHORT,
    "flux2": {"negative_prompt": ..., "text_encoder_out_layers": (1, 2), **_SHORT},
    "qwenimage": {"true_cfg_scale": 3.0, "guidance_scale": ..., "max_sequence_length": 256},
    "z_image": _SHORT,
    "lumina2": {"height": 128, "width": 128, **_SHORT},  # it counts on an 8 times smaller latent
    "hunyuandit": {"use_resolution_binning": False},
    "latte": {"height": 8, "width": 8, "video_length": 4, "clean_caption": False},
    "mochi": {**_CLIP, "num_frames": 7},
    "hunyuan_video": {"prompt_template": {"template": "{}", "crop_start": 0}, **_CLIP},
    "allegro": {  # its autoencoder takes large tiles only
        **_CLIP,
        "num_frames": 8,
        "clean_caption": False,
        "output_type": "latent",
    },
    "ddpm": {
        "prompt": ...,
        "negative_prompt": ...,
        **_NO_SIZE,
        "guidance_scale": ...,
        "output_type": "np",
    },
}


# ------------------------------------------------------------------------------------ small parts
def _vae(latent: int = 4) -> nn.Module:
    """A picture's autoencoder that keeps the size: a latent cell for each pixel."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=latent,
        sample_size=16,
        shift_factor=0.1,
    )


def _clip_tokenizer() -> PreTrainedTokenizerBase:
    letters = string.ascii_lowercase
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _t5_tokenizer() -> PreTrainedTokenizerBase:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *string.ascii_letters, *string.digits, ".", ","]
    return T5Tokenizer(vocab=[(p, -float(i)) for i, p in enumerate(pieces)], extra_ids=0)


def _t5(width: int = WIDTH, kind: str = "T5") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4
    )
    return getattr(transformers, f"{kind}EncoderModel")(config)


def _clip(*, projection: bool = False, width: int = WIDTH) -> nn.Module:
    config = transformers.CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


_LANGUAGE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def _language(kind: str, *, head: bool = False) -> nn.Module:
    """A language model, which reads prompts for some pipelines."""
    config = getattr(transformers, f"{kind}Config")(**_LANGUAGE, head_dim=16)
    return getattr(transformers, f"{kind}ForCausalLM" if head else f"{kind}Model")(config)


def _chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def _flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


# --------------------------------------------------------------------------------------- pictures
@family("dit", "DiTPipeline")
def _dit() -> Components:
    return {
        "transformer": diffusers.DiTTransformer2DModel(
            sample_size=8,
            num_layers=3,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,  # with a variance
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,  # the pipeline's null class is 1000
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        "vae": _vae(),
        "scheduler": diffusers.DDIMScheduler(),
    }


@family("sd3", "StableDiffusion3Pipeline")
def _sd3() -> Components:
    return {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=16,  # with fewer its inpainting pipeline refuses it
            out_channels=16,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        ),
        "scheduler": _flow(),
        "vae": _vae(16),
        "text_encoder": _clip(projection=True),
        "tokenizer": _clip_tokenizer(),
        "text_encoder_2": _clip(projection=True),
        "tokenizer_2": _clip_tokenizer(),
        "text_encoder_3": _t5(2 * WIDTH),
        "tokenizer_3": _t5_tokenizer(),
    }


@family("flux", "FluxPipeline")
def _flux() -> Components:
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[4, 4, 8],
        ),
        "scheduler": _flow(),
        "vae": _vae(),
        "text_encoder": _clip(),
        "tokenizer": _clip_tokenizer(),
        "text_encoder_2": _t5(),
        "tokenizer_2": _t5_tokenizer(),
    }


@family("pixart", "PixArtSigmaPipeline")
def _pixart() -> Components:
    return {
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=16,
            num_layers=3,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
        "vae": _vae(),
        "text_encoder": _t5(),
        "tokenizer": _t5_tokenizer(),
    }


@family("sana", "SanaPipeline")
def _sana() -> Components:
    return {
        "transformer": diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=16,
        ),
        "vae": diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock"),
            decoder_block_types=("ResBlock", "ResBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ),
        "scheduler": diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "text_encoder": _language("Gemma2"),
        "tokenizer": tiny_tokenizer(),
    }


@family("cogview4", "CogView4Pipeline")
def _cogview4() -> Components:
    return {
        "transformer": diffusers.CogView4Transformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=16,
            condition_dim=4,
        ),
        "scheduler": _flow(
            base_shift=0.25,
            max_shift=0.75,
            base_image_seq_len=256,
            use_dynamic_shifting=True,
            time_shift_type="linear",
        ),
        "vae": _vae(),
        "text_encoder": _language("Glm"),
        "tokenizer": tiny_tokenizer(),
    }


@family("unet", "StableDiffusionPipeline")
def _unet() -> Components:
    return {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
        ),
        "scheduler": diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        "vae": _vae(),
        "text_encoder": _clip(),
        "tokenizer": _clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@family("sdxl", "StableDiffusionXLPipeline")
def _sdxl() -> Components:
    return {
        "unet": diffusers.UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        "scheduler": diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        "vae": _vae(),
        "text_encoder": _clip(),
        "tokenizer": _clip_tokenizer(),
        "text_encoder_2": _clip(projection=True),
        "tokenizer_2": _clip_tokenizer(),
        "add_watermarker": False,
    }


# ------------------------------------------------------------------------------------------ clips
@family("wan", "WanPipeline")
def _wan() -> Components:
    return {
        "transformer": diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=32,
            num_layers=3,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        ),
        "vae": diffusers.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_spatial=4,
        ),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "text_encoder": _t5(kind="UMT5"),
        "tokenizer": _t5_tokenizer(),
        "transformer_2": None,
    }


@family("cogvideox", "CogVideoXPipeline")
def _cogvideox() -> Components:
    return {
        "transformer": diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=3,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=16,
        ),
        "vae": diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        "scheduler": diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
        "text_encoder": _t5(),
        "tokenizer": _t5_tokenizer(),
    }


@family("ltx", "LTXPipeline")
def _ltx() -> Components:
    return {
        "transformer": diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            patch_size=1,
            patch_size_t=1,
            num_attention_heads=4,
            attention_head_dim=8,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=WIDTH,
        ),
        "vae": diffusers.AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False, False, False, False, False),
            upsample_residual=(False, False, False, False),
            upsample_factor=(1, 1, 1, 1),
            patch_size=1,
            patch_size_t=1,
        ),
        "scheduler": _flow(),
        "text_encoder": _t5(),
        "tokenizer": _t5_tokenizer(),
    }


# ------------------------------------------------------------------------------------- and others
@family("auraflow", "AuraFlowPipeline")
def _auraflow() -> Components:
    return {
        "transformer": diffusers.AuraFlowTransformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=WIDTH,
            pos_embed_max_size=64,
        ),
        "scheduler": _flow(),
        "vae": _vae(),
        "text_encoder": _t5(kind="UMT5"),
        "tokenizer": _t5_tokenizer(),
    }


@family("chroma", "ChromaPipeline")
def _chroma() -> Components:
    return {
        "transformer": diffusers.ChromaTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        "scheduler": _flow(),
        "vae": _vae(),
        "text_encoder": _t5(),
        "tokenizer": _t5_tokenizer(),
    }


@family("flux2", "Flux2KleinPipeline")
def _flux2() -> Components:
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        "scheduler": _flow(),
        "vae": diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",),
            up_block_types=("UpDecoderBlock2D",),
            block_out_channels=(8,),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        "text_encoder": _language("Qwen3", head=True),
        "tokenizer": _chat_tokenizer(),
    }


@family("qwenimage", "QwenImagePipeline")
def _qwenimage() -> Components:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_LANGUAGE, "rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
        },
    )
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
        "scheduler": _flow(),
        "vae": diffusers.AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tiny_tokenizer(),
    }


@family("z_image", "ZImagePipeline")
def _z_image() -> Components:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        nn.init.normal_(token)  # made without a value
    return {
        "transformer": transformer,
        "scheduler": _flow(),
        "vae": _vae(),
        "text_encoder": _language("Qwen3"),
        "tokenizer": _chat_tokenizer(),
    }


@family("lumina2", "Lumina2Pipeline")
def _lumina2() -> Components:
    return {
        "transformer": diffusers.Lumina2Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=32,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(8, 4, 4),
            cap_feat_dim=WIDTH,
        ),
        "scheduler": _flow(),
        "vae": _vae(),
        "text_encoder": _language("Gemma2"),
        "tokenizer": tiny_tokenizer(),
    }


@family("hunyuandit", "HunyuanDiTPipeline")
def _hunyuandit() -> Components:
    bert = transformers.BertConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return {
        "transformer": diffusers.HunyuanDiT2DModel(
            sample_size=16,
            num_layers=4,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            in_channels=4,
            cross_attention_dim=WIDTH,
            cross_attention_dim_t5=WIDTH,
            pooled_projection_dim=16,
            hidden_size=24,
        ),
        "scheduler": diffusers.DDPMScheduler(prediction_type="v_prediction"),
        "vae": _vae(),
        "text_encoder": transformers.BertModel(bert),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": _t5(),
        "tokenizer_2": _t5_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@family("latte", "LattePipeline")
def _latte() -> Components:
    return {
        "transformer": diffusers.LatteTransformer3DModel(
            sample_size=8,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            attention_bias=True,
            activation_fn="gelu-approximate",
            video_length=4,
        ),
        "scheduler": diffusers.DDIMScheduler(),
        "vae": _vae(),
        "text_encoder": _t5(),
        "tokenizer": _t5_tokenizer(),
    }


@family("mochi", "MochiPipeline")
def _mochi() -> Components:
    return {
        "transformer": diffusers.MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            max_sequence_length=16,
        ),
        "scheduler": _flow(),
        "vae": diffusers.AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        "text_encoder": _t5(),
        "tokenizer": _t5_tokenizer(),
    }


@family("hunyuan_video", "HunyuanVideoPipeline")
def _hunyuan_video() -> Components:
    blocks = ("HunyuanVideoDownBlock3D",) * 4, ("HunyuanVideoUpBlock3D",) * 4
    return {
        "transformer": diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        "scheduler": _flow(),
        "vae": diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=blocks[0],
            up_block_types=blocks[1],
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
        ),
        "text_encoder": _language("Llama"),
        "tokenizer": tiny_tokenizer(),
        "text_encoder_2": _clip(),
        "tokenizer_2": _clip_tokenizer(),
    }


@family("allegro", "AllegroPipeline")
def _allegro() -> Components:
    return {
        "transformer": diffusers.AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            cross_attention_dim=24,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
            caption_channels=WIDTH,
        ),
        "vae": diffusers.AutoencoderKLAllegro(
            down_block_types=("AllegroDownBlock3D",) * 4,
            up_block_types=("AllegroUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        ),
        "scheduler": diffusers.EulerAncestralDiscreteScheduler(),
        "text_encoder": _t5(),
        "tokenizer": _t5_tokenizer(),
    }


@family("ddpm", "DDPMPipeline")
def _ddpm() -> Components:
    return {
        "unet": diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ),
        "scheduler": diffusers.DDPMScheduler(),
    }
