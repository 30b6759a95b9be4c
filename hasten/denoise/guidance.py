"""How a pipeline combines its conditional and unconditional branch, found out from one step.

Some pipelines run both branches in one call, some in two; some put the conditional one first. All
of them hand `unconditional + scale * (conditional - unconditional)` to the scheduler, some with the
sign turned. So one step with both outputs and what came of them tells the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 0.05  # of the combination's size; guidance rescaling bends the straight line a little


@dataclass(frozen=True)
class Guidance:
    """How branches are combined.

    Attributes:
        batched: both branches are halves of one call; else they are two calls of a step.
        conditional: which half, or which call, is the conditional one.
        scale: the guidance scale.
    """

    batched: bool
    conditional: int
    scale: float

    def rows(self, count: int) -> Tensor:
        """The rows of the conditional branch in a call of so many."""
        half = count // 2
        return torch.arange(half) + self.conditional * half

    def split(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(samples, ...) outputs of the conditional and of the unconditional branch."""
        pair = outputs[0].chunk(2) if self.batched else outputs[:2]
        return pair[self.conditional], pair[1 - self.conditional]

    def join(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Both branches as one output, in the pipeline's order."""
        pair = [unconditional, conditional] if self.conditional else [conditional, unconditional]
        return torch.cat(pair)


def find_guidance(outputs: list[Tensor], combined: Tensor) -> Guidance | None:
    """How the outputs of a step's calls became what the scheduler was given; None if not by guidance.

    Args:
        outputs: one for each call of the step, (rows, ...).
        combined: what the scheduler was given; it may lack channels that only tell a variance.
    """
    if len(outputs) == 2:
        pair, batched = outputs, False
    elif len(outputs) == 1 and len(outputs[0]) % 2 == 0:
        pair, batched = list(outputs[0].chunk(2)), True
        if len(combined) == len(outputs[0]):  # the pipeline keeps each sample twice
            halves = combined.chunk(2)
            if not torch.equal(*halves):
                return None
            combined = halves[0]
    else:
        return None
    if any(len(half) != len(combined) for half in pair):
        return None
    channels = combined.shape[1]
    first, second = (half[:, :channels].double() for half in pair)
    target, apart = combined.double(), second - first
    size = float((apart * apart).sum())
    if size == 0.0:
        return None
    for sign in (1.0, -1.0):
        scale = float(((sign * target - first) * apart).sum()) / size
        left = float((sign * target - first - scale * apart).norm())
        if left <= TOLERANCE * float(target.norm()):
            conditional = int(scale > 0.5)  # the other order would have 1 - scale
            return Guidance(batched, conditional, scale if conditional else 1.0 - scale)
    return None
