"""Random key blocks: each cell of queries reads cells drawn by chance.

A plain rival of techniques that choose with care: as many keys are read, at the same cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hasten.denoise.attention.patterns import PATTERNS, Patterned, visible
from hasten.technique import Card, Contract, Loss, Phase, Resource, Slot, knob, technique


@technique("random_key_blocks")
@dataclass(frozen=True, kw_only=True)
class RandomKeyBlocks(Patterned):
    """Lets the queries of a cell read as many cells as grat would, drawn by chance."""

    card: ClassVar[Card] = Card(
        title="Each cell of queries reads random cells of keys",
        family="diffusion",
        loss=Loss.LOSSY,
        neutral={"density": 1.0},
        saves="attention",
        notes="A baseline. The same cells are read at all steps and in all layers.",
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.ATTENTION,), needs=frozenset({Resource.TOKEN_SET}), phase=Phase.PASS
    )

    cell: int = knob(8, "tokens of a cell's side", low=1)
    cell_frames: int = knob(4, "frames of tokens of a cell, in clips", low=1)
    density: float = knob(
        0.0,
        "share of the cells that are read; 0 reads as many as `pattern` does",
        low=0.0,
        high=1.0,
    )
    pattern: str = knob(
        "criss_cross", "pattern of grat that says how many cells are read", choices=PATTERNS
    )
    radius: int = knob(1, "of that pattern", low=0)
    dense_steps: int = knob(0, "steps of 50 at the start that read everything", low=0, high=50)
    seed: int = knob(0, "seed of the choice", low=0)

    def seen(self, places: Tensor) -> Tensor:
        """See `Patterned.seen`."""
        cells = len(places)
        counts = visible(places, self.pattern, self.radius).sum(dim=1, keepdim=True)
        if self.density > 0.0:
            counts = torch.full((cells, 1), max(1, round(self.density * cells)))
        luck = torch.rand(cells, cells, generator=torch.Generator().manual_seed(self.seed))
        return luck.argsort(dim=1).argsort(dim=1) < counts
