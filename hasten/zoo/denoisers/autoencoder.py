"""The autoencoder that the picture models share: 4x4 pixels become one cell of latent numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hasten.zoo.denoisers.data import Batch, SceneClips, ScenePictures
from hasten.zoo.scenes.caption import HELD_OUT

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PRIOR = 5e-4  # weight of the pull towards a standard normal; keeps the latents smooth and small


def new_autoencoder(channels: tuple[int, int, int], latent_channels: int) -> AutoencoderKL:
    """An untrained one. Two halvings: a picture of 64 pixels has 16x16 cells."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def autoencoder_loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean absolute error, which keeps edges sharp, squared error and the pull to the prior."""
    posterior = model.encode(batch.pictures).latent_dist  # type: ignore[operator]
    decoded = model.decode(posterior.sample()).sample.float()  # type: ignore[operator]
    error = decoded - batch.pictures
    prior = posterior.kl().float().mean() / posterior.mean[0].numel()
    return error.abs().mean() + 2 * error.square().mean() + PRIOR * prior, {}


class _Kernel(nn.Module):
    """A convolution's kernel, kept as the matrix (channels out, channels in times places)."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.shape)

    def right_inverse(self, kernel: Tensor) -> Tensor:
        return kernel.flatten(1)


@contextmanager
def kernels_as_matrices(model: nn.Module) -> Iterator[None]:
    """For the time being, have what learns in a convolution be a matrix, which Muon can update."""
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))]
    for layer in convolutions:
        parametrize.register_parametrization(layer, "weight", _Kernel(layer.weight.shape))
    try:
        yield
    finally:
        for layer in convolutions:
            parametrize.remove_parametrizations(layer, "weight")


@torch.no_grad()
def autoencoder_quality(model: nn.Module, *, rows: int = 64, seed: int = 0) -> dict[str, float]:
    """PSNR in decibels on held-out scenes of 64 and 32 pixels, and the latents' spread."""
    data = ScenePictures(HELD_OUT + seed)
    found = {}
    for length, name in ((256, "psnr_64"), (64, "psnr_32")):
        pictures = data.batch(0, rows, length).pictures
        latents = model.encode(pictures).latent_dist.mode()  # type: ignore[operator]
        decoded = model.decode(latents).sample.clamp(-1, 1)  # type: ignore[operator]
        found[name] = psnr(decoded, pictures)
        if length == 256:
            found["latent_std"] = float(latents.float().std())
            found["latent_mean"] = float(latents.float().mean(dim=(0, 2, 3)).abs().max())
    return found


def psnr(first: Tensor, second: Tensor) -> float:
    """Mean over pictures (rows, ...) from -1 to 1 of the peak signal-to-noise ratio, decibels."""
    error = (first.float() - second.float()).square().flatten(1).mean(dim=1) / 4
    return float((-10 * error.clamp_min(1e-12).log10()).mean())


@torch.no_grad()
def video_autoencoder_quality(
    model: nn.Module, *, rows: int = 16, seed: int = 0
) -> dict[str, float]:
    """PSNR in decibels over the frames of held-out clips, and the latents' spread."""
    clips = SceneClips(HELD_OUT + seed).batch(0, rows, 512).pictures
    latents = model.encode(clips).latent_dist.mode()  # type: ignore[operator]
    decoded = model.decode(latents).sample.clamp(-1, 1)  # type: ignore[operator]
    return {
        "psnr": psnr(decoded.transpose(1, 2).flatten(0, 1), clips.transpose(1, 2).flatten(0, 1)),
        "latent_std": float(latents.float().std()),
    }


@torch.no_grad()
def normalise(model: Any, data: ScenePictures | SceneClips) -> None:
    """Have the autoencoder's scale (and of clips, each channel's) give latents of unit variance."""
    clips = isinstance(data, SceneClips)
    pictures = data.batch(0, 64 if clips else 256, 512 if clips else 256).pictures
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in pictures.split(32)])
    if clips:
        flat = latents.transpose(0, 1).flatten(1)
        model.latents_mean.copy_(flat.mean(dim=1))
        model.latents_std.copy_(flat.std(dim=1))
    else:
        model.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
