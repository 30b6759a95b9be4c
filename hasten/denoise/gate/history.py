"""What gates remember of the steps behind them, and which steps they may skip."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from hasten.denoise.guidance import like
from hasten.denoise.levels import Level
from hasten.denoise.run import Run

FEWEST_STEPS = 9
"""Samplers of fewer steps are left alone: between so few, one output says little of the next."""

FIRST_STEPS = 3
"""So many outputs have to be there before anything is predicted from them."""


def window(run: Run, start: float, end: float) -> range:
    """The steps after which the next one may be skipped.

    The first steps are always computed, and so is the last.

    Args:
        start, end: shares of the steps; the end is exclusive.
    """
    if run.num_steps < FEWEST_STEPS:
        return range(0)
    wanted = run.span(start, end, of=1)
    return range(max(wanted.start, FIRST_STEPS), min(wanted.stop, run.num_steps - 2))


def late_step(run: Run, share: float, interval: int) -> int:
    """The step from which one of `interval` is computed; a multiple of the interval."""
    return interval * round(share * run.num_steps / interval)


class Nodes:
    """The polynomial through the last few values of a tensor."""

    def __init__(self, count: int) -> None:
        self.kept: deque[tuple[float, Tensor]] = deque(maxlen=count)

    def __len__(self) -> int:
        return len(self.kept)

    def add(self, place: float, value: Tensor) -> None:
        """Add a value and forget the oldest one; places must differ."""
        self.kept.append((place, value))

    def at(self, place: float) -> Tensor:
        """The value of Lagrange's polynomial at a place."""
        terms = []
        for here, value in self.kept:
            others = [other for other, _ in self.kept if other != here]
            weight = 1.0
            for other in others:
                weight *= (place - other) / (here - other)
            terms.append(weight * value)
        return torch.stack(terms).sum(dim=0)


def mean_part(output: Tensor, sample: Tensor) -> Tensor:
    """An output without the channels that only tell a variance, in float32.

    Args:
        output: (batch, channels or twice as many, ...).
        sample: (batch, channels, ...).
    """
    return like(output, sample).float()


def with_mean_part(mean: Tensor, output: Tensor) -> Tensor:
    """The output with another mean part; channels that tell a variance stay."""
    mean = mean.to(output.dtype)
    if mean.shape == output.shape:
        return mean
    return torch.cat((mean, output[:, mean.shape[1] :]), dim=1)


def clean_sample(level: Level, output: Tensor, sample: Tensor) -> Tensor:
    """(batch, channels, ...) the clean sample that an output speaks of, in float32."""
    return level.clean(mean_part(output, sample), sample.float())


def output_for(level: Level, clean: Tensor, output: Tensor, sample: Tensor) -> Tensor:
    """The output that speaks of a clean sample, in the shape and dtype of another output."""
    return with_mean_part(level.output_of_clean(clean, sample.float()), output)
