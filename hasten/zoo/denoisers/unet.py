"""scenes-unet: a noise-predicting U-Net that draws captions, as a Stable Diffusion pipeline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from hasten.zoo.denoisers.base import Denoiser, noise_levels
from hasten.zoo.denoisers.data import Batch
from hasten.zoo.denoisers.words import END, PAD, START, VOCABULARY, word_tokenizer

WORDS = 16  # tokens that every caption is padded to


class SceneUNet(Denoiser):
    """The network predicts the noise in sqrt(a) picture + sqrt(1 - a) noise, at times 0 to 999."""

    def __init__(
        self,
        autoencoder: Any,
        *,
        widths: tuple[int, ...],
        cells: int,
        words_dim: int,
        heads: int,
    ) -> None:
        from diffusers import UNet2DConditionModel

        channels = autoencoder.config.latent_channels
        # Attention at every size but the smallest, as in Stable Diffusion.
        across = len(widths) - 1
        network: Any = UNet2DConditionModel(
            sample_size=cells,
            in_channels=channels,
            out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * across + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * across,
            block_out_channels=widths,
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=words_dim,
            attention_head_dim=heads,  # Diffusers keeps this old name for the number of heads
        )
        super().__init__(
            CLIPTextModel(_clip_config(words_dim)),
            network,
            autoencoder,
            word_tokenizer(start=True, end=True, padding_side="right", max_length=WORDS),
        )
        self.scheduler = ddim()

    def text(self, captions: tuple[str, ...]) -> Tensor:
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=WORDS, return_tensors="pt"
        )["input_ids"]
        embeddings: Tensor = self.text_encoder(ids.to(self.text_encoder.device))[0]
        return embeddings

    def loss(self, batch: Batch) -> Tensor:
        latents = self.encode(batch.pictures)
        times = (1000 * noise_levels(len(latents))).long().clamp_max(999).to(latents.device)
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, times)
        predicted = self.network(noisy, times, self.text(batch.captions), return_dict=False)[0]
        return (predicted.float() - noise).square().mean()

    def pipeline(self) -> Any:
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline(
            vae=self.autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.network,
            scheduler=ddim(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def ddim() -> Any:
    """Stable Diffusion's noise schedule, for DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _clip_config(dim: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=dim,
        intermediate_size=2 * dim,
        projection_dim=dim,
        num_hidden_layers=2,
        num_attention_heads=dim // 32,
        max_position_embeddings=WORDS,
        hidden_act="gelu",
        pad_token_id=VOCABULARY.index(PAD),
        bos_token_id=VOCABULARY.index(START),
        eos_token_id=VOCABULARY.index(END),
    )
