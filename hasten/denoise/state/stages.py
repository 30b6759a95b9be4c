"""The rows of a stream: frames at the stages of their ways."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.denoise.levels import Level
from hasten.denoise.state.times import EndlessLoop
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.denoise.stream import Session


@dataclass
class Rows:
    """The rows of one network call, stage by stage, the newest frames first.

    Attributes:
        x: what the network is given.
        frames: latents of the frames that the rows come from.
        residual: noise that stands for the unconditional prediction.
    """

    x: Tensor
    frames: Tensor
    residual: Tensor

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.x[part], self.frames[part], self.residual[part])

    @classmethod
    def join(cls, parts: list[Rows]) -> Rows:
        """All rows of some, one after the other."""
        names = ("x", "frames", "residual")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


@dataclass
class Progress:
    """One call of the pipeline.

    Attributes:
        session: the stream, or None in an ordinary call.
        loop: the scheduler's list, made endless for a stream.
        times, levels, scalings: timestep, noise level and (skip, out) of each stage.
        noises: (stages, ...) noise of each stage.
        waiting: rows at the stages after the first.
        rows: rows of the call in hand.
        pair: outputs of both branches at the step in hand.
        first: the noise predicted without a condition at the first step of an ordinary call.
    """

    session: Session | None = None
    loop: EndlessLoop | None = None
    times: list[float] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)
    scalings: list[tuple[float, float]] = field(default_factory=list)
    noises: Tensor | None = None
    waiting: Rows | None = None
    rows: Rows | None = None
    pair: tuple[Tensor, Tensor] | None = None
    first: Tensor | None = None


def stage_places(steps: int, stages: int, strength: float) -> list[int]:
    """Which of `steps` timesteps the stages are: evenly over the last `strength` of them.

    Raises:
        HastenError: where there are fewer timesteps than stages.
    """
    first = min(steps - 1, round(steps * (1.0 - strength)))
    if stages > steps - first:
        raise HastenError(
            f"stream_diffusion: {stages} stages do not fit into the {steps - first} timesteps that strength="
            f"{strength:g} leaves of {steps}; lower stages, or raise strength or steps."
        )
    return [first + (steps - first) * i // stages for i in range(stages)]
