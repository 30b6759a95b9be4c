"""Ways to fix several places in one pass, shared by the committers.

All of them fix the most confident open place of each row, so that every pass makes progress.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.masked.run import Run
from hasten.masked.slots import Guess


def above(run: Run, guess: Guess, threshold: float) -> Tensor:
    """(batch, length) bool, the open places at or above a confidence, and each row's best."""
    places = run.open
    return (places & (guess.confidence >= threshold)) | run.best(guess, places)


def spread(run: Run, guess: Guess, threshold: float, low_threshold: float) -> Tensor:
    """As `above`, and of each stretch of open places its best, if that exceeds `low_threshold`.

    A fixed place ends a stretch, so what is fixed below `threshold` in one pass has a fixed place
    between any two of them.
    """
    places = run.open
    bests = best_of_stretches(guess.confidence, places)
    return above(run, guess, threshold) | (bests & (guess.confidence > low_threshold))


def best_of_stretches(confidence: Tensor, places: Tensor) -> Tensor:
    """(batch, length) bool, of each unbroken stretch of places (bool) the most confident one.

    Of equally confident ones the first.
    """
    batch, length = places.shape
    before = torch.nn.functional.pad(places, (1, 0))[:, :-1]
    stretch = (places & ~before).long().cumsum(dim=1).masked_fill(~places, 0)  # 0 is no stretch
    tops = confidence.new_full((batch, length + 1), -1.0)
    tops = tops.scatter_reduce(1, stretch, confidence, "amax")
    at_top = places & (confidence == tops.gather(1, stretch))
    columns = torch.arange(length, device=places.device).expand_as(stretch)
    firsts = columns.new_full((batch, length + 1), length)
    firsts = firsts.scatter_reduce(1, stretch, columns.masked_fill(~at_top, length), "amin")
    return at_top & (columns == firsts.gather(1, stretch))


def count_parallel(run: Run, chosen: Tensor, name: str) -> None:
    """Count the places that are fixed beyond one for each row."""
    extra = int((chosen.sum(dim=1) - 1).clamp(min=0).sum())
    if extra:
        run.activity[f"{name}.parallel"] += extra
