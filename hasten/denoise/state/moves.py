"""A row's way from one stage of a stream to the next, with guidance by a residual noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hasten.denoise.guidance import like
from hasten.denoise.state.stages import Progress, Rows

if TYPE_CHECKING:
    from hasten.denoise.state.stream_diffusion import StreamDiffusion


@dataclass
class Estimate:
    """What a network's output says of rows at a stage.

    Attributes:
        clean: the clean latents; `noise`: the guided noise.
        residual: what stands for the unconditional prediction.
    """

    clean: Tensor
    noise: Tensor
    residual: Tensor


def estimate(
    technique: StreamDiffusion, state: Progress, rows: Rows, output: Tensor, stage: int
) -> Estimate:
    """The clean estimate of rows at a stage.

    Args:
        output: (rows, ...) the network's, for these rows.
    """
    at, residual = state.levels[stage], rows.residual
    noise, clean = at.noise(output, rows.x), at.clean(output, rows.x)
    if technique.residual == "initialize" and stage == 0 and state.pair is not None:
        unconditional = like(state.pair[1][: len(rows.x)], rows.x)
        residual = at.noise(unconditional.to(rows.x.dtype), rows.x)
    guides = technique.residual in ("self", "initialize") and technique.guidance > 1.0
    if guides and at.alpha > 0.0:
        noise = noise + (technique.guidance - 1.0) * (noise - technique.delta * residual)
        clean = (rows.x - at.sigma * noise) / at.alpha
    skip, out = state.scalings[stage]
    return Estimate(out * clean + skip * rows.x if skip else clean, noise, residual)


def noised_again(
    technique: StreamDiffusion, state: Progress, frames: Tensor, done: Estimate, stage: int
) -> Rows:
    """The rows at their next stage.

    Args:
        frames: (rows, ...) latents of the frames that the rows come from.
    """
    assert state.noises is not None
    at, residual = state.levels[stage], done.residual
    x = at.alpha * done.clean
    if technique.renoise != "none":
        own = state.noises[stage].expand_as(x)
        x = x + at.sigma * (own if technique.renoise == "stage" else done.noise)
    if technique.residual == "self" and at.sigma > 0.0:
        residual = (x - at.alpha * frames) / at.sigma
    return Rows(x, frames, residual)
