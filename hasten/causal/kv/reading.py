"""What techniques share that read part of a complete cache: picking entries, counting reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.causal.attention import AttentionView
from hasten.causal.run import Run


def visible(view: AttentionView) -> Tensor | None:
    """Bool (batch, heads or 1, block, length), True where a row may look; None where all may."""
    if view.mask is not None or view.query.shape[2] == 1:
        return view.mask
    block, length = view.query.shape[2], view.layer.length
    causal = torch.ones((block, length), dtype=torch.bool, device=view.query.device)
    return causal.tril(length - block)[None, None]


def top_entries(scores: Tensor, seen: Tensor | None, share: float) -> Tensor | None:
    """The entries with the highest scores, a share of those that each row may see.

    The number is rounded up, row by row, so that a row reads the same whether its batch is padded
    or not.

    Args:
        scores: (batch, heads, [rows,] length).
        seen: bool that broadcasts to `scores`; None where everything may be seen.
        share: of the visible entries, 0 to 1.

    Returns:
        Indices (batch, heads, [rows,] read), -1 behind a row's own number; None where every row
        reads all that it may see.
    """
    if seen is None:
        length = scores.shape[-1]
        count = _rounded_up(share * length)
        return None if count >= length else scores.topk(count, dim=-1).indices
    num_seen = seen.sum(dim=-1, keepdim=True)
    counts = (num_seen.double() * share - 1e-9).ceil().long().clamp(min=1)
    if bool((counts >= num_seen).all()):
        return None
    found = scores.masked_fill(~seen, float("-inf")).topk(int(counts.max()), dim=-1).indices
    return found.masked_fill(torch.arange(found.shape[-1], device=found.device) >= counts, -1)


@dataclass
class Reads:
    """Counts cache entries that attention read, one per row, layer, query head and query."""

    read: int = 0
    all: int = 0

    def add(self, view: AttentionView, chosen: Tensor | None) -> None:
        """Count one layer's pass; `chosen` as `KV.read` returns it."""
        batch, heads, block, _ = view.query.shape
        if view.mask is None:
            every = batch * heads * block * view.layer.length
        else:  # a hole's own row does not count
            real = view.mask & (view.positions >= 0)[:, None, :, None]
            every = int(real.sum()) * (heads // real.shape[1])
        self.all += every
        if chosen is None:
            self.read += every
            return
        rows = block if chosen.dim() == 3 else 1
        self.read += int((chosen >= 0).sum()) * (heads // chosen.shape[1]) * rows

    def report(self, run: Run, name: str) -> bool:
        """Write the counters if anything was skipped; say whether."""
        if self.read >= self.all:
            return False
        run.activity[f"{name}.entries_read"] += self.read
        run.activity[f"{name}.entries_skipped"] += self.all - self.read
        return True


def _rounded_up(value: float) -> int:
    """The next whole number; what floating point adds to an exact one does not count."""
    return max(1, math.ceil(value - 1e-9))
