"""Block caches with a refreshed vicinity: which positions a pass computes anew.

From the reference code of dInfer. Keys and values far from the block in hand change little from
pass to pass and are kept; those near it change most and are computed again with it. Ours: a pass
over everything also decides tokens and is not followed by a second one; warm-up passes fill the
cache; and the refresh period counts from the last pass over everything, whatever brought it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.masked.run import Run


@dataclass
class Vicinity:
    """The cache policy during one call.

    Attributes:
        keeps_behind: what lies behind the block is kept too ("dual"), not only what lies before it.
        before: positions before the block that are computed with it.
        after: positions behind the block that are computed with it.
        warmup: passes over everything at the start of the call.
        period: passes from one over everything to the next within a block; 0 is never.
    """

    keeps_behind: bool
    before: int
    after: int
    warmup: int
    period: int
    passes: int = 0
    age: int = 0
    block: tuple[int, int] | None = None

    def rows(self, run: Run) -> Tensor | None:
        """(rows,) ascending positions for the next pass; None for all of them."""
        self.passes += 1
        self.age += 1
        due = bool(self.period) and self.age >= self.period
        if self.passes <= self.warmup or run.block != self.block or due:
            self.block, self.age = run.block, 0
            return None
        # A shifted model speaks of a place one position earlier; a remasker asks for more places.
        source = int(run.denoiser.sources(run.needed()).min())
        first = max(0, min(source, run.block[0] - self.before))
        end = min(run.length, run.block[1] + self.after) if self.keeps_behind else run.length
        return torch.arange(first, end, device=run.tokens.device)
