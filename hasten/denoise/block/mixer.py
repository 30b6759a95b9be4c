"""What layers put out while harmonica's table is trained: fresh outputs, kept ones, or a mixture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.block.harmonica import THRESHOLD
from hasten.denoise.block.layers import Counting, Place, each
from hasten.denoise.run import Run
from hasten.denoise.slots import Block
from hasten.technique import Card, Contract, Loss


class Mixer(Block):
    """What layers put out during training.

    Attributes:
        mode: "fill" runs all and keeps it; "plain" runs all and keeps nothing; "mix" mixes fresh and
            kept outputs; "hard" runs what the table says at the steps in `steps`, and all at others.
        chances: (columns,) that each layer runs, at the step in hand.
    """

    sublayers = True
    card: ClassVar[Card] = Card(title="training", family="", loss=Loss.LOSSY)
    contract: ClassVar[Contract] = Contract(slots=())
    name: ClassVar[str] = "harmonica_training"

    def __init__(self) -> None:
        self.mode = "fill"
        self.steps: frozenset[int] = frozenset()
        self.table: list[list[bool]] = []
        self.chances = torch.zeros(0)
        self.columns: dict[Place, int] = {}
        self.counting = Counting()
        self.kept: dict[tuple[int, int, int], Any] = {}

    def clear(self) -> None:
        """Begin a trajectory."""
        self.kept = {}
        self.counting = Counting()

    def sublayer(
        self, state: Any, run: Run, key: tuple[int, str], compute: Callable[[], Any]
    ) -> Any:
        """See `Block.sublayer`."""
        place = self.counting.place(run, key)
        column = self.columns.setdefault(place, len(self.columns))
        where = (id(run.call.module), run.call.branch, column)
        if self.mode == "hard" and run.index in self.steps and where in self.kept:
            runs = self.table[run.index][column]
        else:
            runs = True
        fresh = compute() if runs else self.kept[where]
        if self.mode == "plain":
            return fresh
        if self.mode != "mix" or where not in self.kept:
            self.kept[where] = each(Tensor.detach, fresh)
            return fresh
        chance, old = self.chances[column], self.kept[where]
        mixed = each(
            lambda new, kept: (chance * new + (1 - chance) * kept).to(new.dtype), fresh, old
        )
        if float(chance.detach()) > THRESHOLD:
            self.kept[where] = each(Tensor.detach, fresh)
        return mixed
