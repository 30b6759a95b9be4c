"""From pictures to a pipeline's latents and back, as the pipeline itself would do it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.denoise.state.sizes import Size, packed_latents, unpacked_latents
from hasten.errors import SubjectError


@dataclass
class Coder:
    """Codes pictures for one pipeline.

    Attributes:
        pipe: the pipeline.
        size: how its samples lie, where they are packed into tokens.
    """

    pipe: Any
    size: Size | None = None

    @property
    def vae(self) -> Any:
        """The pipeline's autoencoder; None where its samples are pixels."""
        return getattr(self.pipe, "vae", None)

    def check(self, who: str) -> None:
        """Raise a SubjectError, which names a technique, where the pipeline makes no single pictures."""
        kind = type(self.pipe)
        if {"num_frames", "video_length"} & set(inspect.signature(kind.__call__).parameters):
            raise SubjectError(
                f"{kind.__name__} makes clips; {who} takes pipelines that make single pictures."
            )

    def pixels(self, frame: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """(1, 3, height, width) values from -1 to 1 of a PIL picture, an array or a tensor in [0, 1]."""
        from diffusers.image_processor import VaeImageProcessor

        factor = getattr(self.pipe, "vae_scale_factor", 1)
        processor = getattr(self.pipe, "image_processor", None)
        if processor is None:
            processor = VaeImageProcessor(vae_scale_factor=factor)
        made: Tensor = processor.preprocess(frame, height=height, width=width)
        return made

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pictures, in the layout of the pipeline's samples; the mean where they vary."""
        vae = self.vae
        if vae is None:
            return pixels
        video = _wants_frames(vae)
        x = pixels.to(vae.device, vae.dtype)
        with torch.no_grad():
            coded = vae.encode(x.unsqueeze(2) if video else x)
        latent = coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded[0]
        latent = self._normalized(latent)
        latent = latent.squeeze(2) if video else latent
        return latent if not self._is_packed else packed_latents(latent, self.size)

    def decode(self, latents: Tensor) -> Tensor:
        """(n, 3, height, width) values from 0 to 1 of latents in the layout of the pipeline's samples."""
        vae = self.vae
        x = latents if not self._is_packed else unpacked_latents(latents, self.size)
        if vae is None:
            return (x.float() / 2 + 0.5).clamp(0, 1)
        video = _wants_frames(vae)
        x = (
            x.squeeze(2) if x.ndim == 5 else x
        )  # some networks read a picture as a clip of one frame
        x = x.unsqueeze(2) if video else x
        x = self._raw(x).to(vae.device, vae.dtype)
        with torch.no_grad():
            made = vae.decode(x, return_dict=False)[0]
        made = made[:, :, 0] if made.ndim == 5 else made
        return (made.float() / 2 + 0.5).clamp(0, 1)

    @property
    def _is_packed(self) -> bool:
        return self.size is not None and self.size.packed > 0

    def _normalized(self, latent: Tensor) -> Tensor:
        """Latents as the network knows them, of those that the autoencoder puts out."""
        mean, std = self._moments(latent)
        return (latent - mean) / std

    def _raw(self, latent: Tensor) -> Tensor:
        """The inverse."""
        mean, std = self._moments(latent)
        return latent * std + mean

    def _moments(self, like: Tensor) -> tuple[Any, Any]:
        config = self.vae.config
        means, stds = config.get("latents_mean"), config.get("latents_std")
        if means and stds:
            shape = (1, -1, *(1,) * (like.ndim - 2))
            pair = [torch.tensor(v, device=like.device).reshape(shape) for v in (means, stds)]
            return pair[0].to(like.dtype), pair[1].to(like.dtype)
        return config.get("shift_factor") or 0.0, 1.0 / (config.get("scaling_factor") or 1.0)


def _wants_frames(vae: Any) -> bool:
    """Whether an autoencoder takes clips."""
    return any(
        p.ndim == 5 for name, p in vae.named_parameters() if "conv_in" in name or "conv1" in name
    )
