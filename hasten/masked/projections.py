"""Keys and values of a text that a technique of the slot window keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.masked.buffers import Buffers


class Projections(Buffers):
    """Keys and values of all positions of a text, each as last computed.

    A pass over some rows writes theirs and reads all. The first pass must be over all rows.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.rows: Tensor | None = None  # those of the pass in flight; None for all

    def write(self, layer: int | slice, fresh: Tensor) -> None:
        """See `Buffers.write`."""
        states = self.room(fresh)[layer]
        if self.rows is None:
            states[..., : self.length, :] = fresh
        else:
            states.index_copy_(-2, self.rows, fresh)

    def read(self, layer: int) -> Tensor:
        """See `Buffers.read`."""
        assert self.states is not None
        return self.states[layer][..., : self.length, :]

    def columns(self, visible: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """See `Buffers.columns`."""
        if self.rows is None:
            return None, visible
        older = torch.ones(self.length, dtype=torch.bool, device=self.rows.device)
        older[self.rows] = False  # those are computed anew
        if visible is None:
            return older[None, None, None], None
        return visible & older, visible[..., self.rows]

    def take(self, entries: Tensor) -> Projections:
        """A copy with the given entries of the batch, repeats allowed."""
        twin = Projections(self.length)
        assert self.states is not None
        twin.states = self.states.index_select(2, entries)
        return twin
