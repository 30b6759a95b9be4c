"""How a pipeline combines its conditional and unconditional branch, found out from one step.

Some pipelines run both branches in one call, some in two; some put the conditional one first. All
of them hand `unconditional + scale * (conditional - unconditional)` to the scheduler, some with the
sign turned or the length changed. So one step with both outputs and what came of them tells the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 0.05  # of the combination's size: what rounding to 16 bits and a strong scale may leave


@dataclass(frozen=True)
class Guidance:
    """How branches are combined.

    Attributes:
        batched: both branches are halves of one call; else they are two calls of a step.
        conditional: which half, or which call, is the conditional one.
        scale: the guidance scale.
        sign: -1 where the scheduler is given the negative of what the network puts out.
        count: rows of a guided call; some pipelines guide for a part of the way only.
    """

    batched: bool
    conditional: int
    scale: float
    sign: float = 1.0
    count: int = 0

    def holds(self, rows: int) -> bool:
        """Whether a call of so many rows is a guided one."""
        return self.count in (0, rows)

    def rows(self, count: int, *, conditional: bool) -> Tensor:
        """The rows of one branch in a call of so many."""
        half = count // 2
        which = self.conditional if conditional else 1 - self.conditional
        return torch.arange(half) + which * half

    def fits(self, outputs: list[Tensor]) -> bool:
        """Whether a step's outputs are those of both branches."""
        return self.holds(len(outputs[0])) and (self.batched or len(outputs) > 1)

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
    first, second = (like(half, combined).double() for half in pair)
    if first.numel() != combined.numel():
        return None  # the scheduler moves a part of it only, as where a clip begins with a picture
    target = combined.double()
    # Rescaled guidance is a multiple of the straight line: one for each sample, or for each vector.
    lines = [
        _line(*(t.reshape(vectors, -1) for t in (first, second, target)))
        for vectors in (len(target), target.numel() // target.shape[-1])
    ]
    # The second has more to choose from, so it has to be much nearer.
    left, scale, sign = lines[1] if lines[1][0] < 0.5 * lines[0][0] else lines[0]
    if left > TOLERANCE:
        return None
    conditional = int(scale > 0.5)  # the other order would have 1 - scale
    scale = scale if conditional else 1.0 - scale
    return Guidance(batched, conditional, scale, sign, len(outputs[0]))


def _line(first: Tensor, second: Tensor, target: Tensor) -> tuple[float, float, float]:
    """How far the target is from a line, its scale and its sign.

    The line is `+-m * (first + scale * (second - first))`, where each of (vectors, size) has a
    multiple m of its own, and the scale is one for all.
    """
    apart = second - first
    basis = torch.stack([first, apart], dim=-1)  # (vectors, size, 2)
    square = basis.mT @ basis
    known = torch.linalg.det(square) > 1e-12 * square.diagonal(dim1=-2, dim2=-1).prod(dim=-1)
    if not bool(known.any()):
        return math.inf, 0.0, 1.0  # the branches are the same
    basis, square, target = basis[known], square[known], target[known, :, None]
    shares = torch.linalg.solve(square, basis.mT @ target)  # (vectors, 2, 1)
    multiples, scales = shares[:, :1], shares[:, 1:] / shares[:, :1]  # (vectors, 1, 1)
    scale = scales.median()
    line = multiples * (basis[..., :1] + scale * basis[..., 1:])
    left = float((target - line).norm() / target.norm())
    return left, float(scale), float(multiples.median().sign())


def like(output: Tensor, sample: Tensor) -> Tensor:
    """A network's output in the sample's shape: without channels that only tell a variance.

    Some networks put out an axis of one frame beside the sample's own.
    """
    if output.shape == sample.shape:
        return output
    if output.numel() == sample.numel():
        return output.reshape(sample.shape)
    return output[:, : sample.shape[1]]


def own_part(given: Tensor, sample: Tensor) -> Tensor:
    """What of a network's input is the sample, in its shape: first come its own channels, or values.

    Behind them some networks are given masks or pictures.
    """
    if given.numel() == sample.numel():
        return given.reshape(sample.shape)
    return given[tuple(slice(length) for length in sample.shape)]
