"""scenes-video: a flow-matching transformer over whole clips, as an LTX pipeline.

LTX attends over all tokens of all frames at once, its blocks are known to Diffusers' caches, and
its text is masked, so captions cost little. Its autoencoder can be told to keep every frame.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from hasten.zoo.denoisers.base import Denoiser, noise_levels
from hasten.zoo.denoisers.data import PIXELS, Batch
from hasten.zoo.denoisers.words import PAD, VOCABULARY, word_tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKLLTXVideo

PADDED = 128  # tokens that the pipeline pads captions to
WORDS = 24  # of these, how many training looks at; the longest caption has 17
FRAME_RATE = 25  # the pipeline's own, which stretches positions in time
SHIFT = 2.0  # of the noise levels in training


def new_video_autoencoder(
    width: int, latent_channels: int, *, layers: int = 1
) -> AutoencoderKLLTXVideo:
    """An untrained one: 4x4 pixels of each frame become one cell, and frames stay apart."""
    from diffusers import AutoencoderKLLTXVideo

    return AutoencoderKLLTXVideo(
        latent_channels=latent_channels,
        block_out_channels=(width,),
        down_block_types=("LTXVideoDownBlock3D",),
        decoder_block_out_channels=(width,),
        layers_per_block=(layers, layers),
        decoder_layers_per_block=(layers, layers),
        spatio_temporal_scaling=(False,),
        decoder_spatio_temporal_scaling=(False,),
        decoder_inject_noise=(False, False),
        downsample_type=("conv",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=PIXELS,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )


class SceneVideo(Denoiser):
    """The network predicts noise minus clip from (1 - s) clip + s noise, at time 1000 s."""

    def __init__(
        self,
        autoencoder: Any,
        *,
        width: int,
        layers: int,
        heads: int,
        words_dim: int,
    ) -> None:
        from diffusers import LTXVideoTransformer3DModel

        channels = autoencoder.config.latent_channels
        network: Any = LTXVideoTransformer3DModel(
            in_channels=channels,
            out_channels=channels,
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            cross_attention_dim=width,
            num_layers=layers,
            caption_channels=words_dim,
        )
        nn.init.zeros_(network.proj_out.weight)
        nn.init.zeros_(network.proj_out.bias)
        super().__init__(
            T5EncoderModel(_t5_config(words_dim)),
            network,
            autoencoder,
            word_tokenizer(start=False, end=True, padding_side="right", max_length=PADDED),
        )

    def words(self, captions: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Embeddings (rows, WORDS, channels) as the pipeline makes them, and which are no padding.

        The encoder reads the padding, as it does in the pipeline; the network never does, so it
        can be cut off here.
        """
        found = self.tokenizer(
            list(captions), padding="max_length", max_length=PADDED, return_tensors="pt"
        )
        embeddings = self.text_encoder(found["input_ids"].to(self.text_encoder.device))[0]
        return embeddings[:, :WORDS], found["attention_mask"][:, :WORDS].to(embeddings.device)

    def text(self, captions: tuple[str, ...]) -> Tensor:
        return self.words(captions)[0]

    def loss(self, batch: Batch) -> Tensor:
        latents = self.encode(batch.pictures)
        frames, height, width = latents.shape[2:]
        latents = latents.flatten(2).transpose(1, 2)
        level = noise_levels(len(latents), SHIFT).to(latents.device)
        noise = torch.randn_like(latents)
        embeddings, mask = self.words(batch.captions)
        predicted = self.network(
            torch.lerp(latents, noise, level[:, None, None]),
            embeddings,
            1000 * level,
            mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(1 / FRAME_RATE, PIXELS, PIXELS),
            return_dict=False,
        )[0]
        return (predicted.float() - (noise - latents)).square().mean()

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        latents = self.autoencoder.encode(pictures).latent_dist.mode().float()
        mean, std = (
            part[None, :, None, None, None]
            for part in (self.autoencoder.latents_mean, self.autoencoder.latents_std)
        )
        scaled: Tensor = (latents - mean) * self.autoencoder.config.scaling_factor / std
        return scaled

    def pipeline(self) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

        return LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=self.autoencoder,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            transformer=self.network,
        )


def _t5_config(dim: int) -> T5Config:
    return T5Config(
        vocab_size=len(VOCABULARY),
        d_model=dim,
        d_kv=32,
        d_ff=2 * dim,
        num_layers=2,
        num_heads=dim // 32,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=VOCABULARY.index(PAD),
    )
