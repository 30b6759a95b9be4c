"""Fixed patterns of cells: which ones the queries of a cell read, for grat and its plain rival."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.denoise.attention.sparse import Cells, Reads, attend
from hasten.denoise.blocks import AttentionCall
from hasten.denoise.layout import Grid
from hasten.denoise.run import Run
from hasten.denoise.slots import Attention

PATTERNS = ("criss_cross", "surrounding")


def visible(places: Tensor, pattern: str, radius: int) -> Tensor:
    """(cells, cells) whether the queries of a cell, by row, read the keys of another.

    Args:
        places: (cells, axes) which cell it is along each axis.
        pattern: "criss_cross" is the same place along at least one axis, of those axes that are cut;
            "surrounding" is at most `radius` cells away along each.
    """
    apart = (places[:, None] - places[None]).abs()
    if pattern == "surrounding":
        return (apart <= radius).all(dim=-1)
    cut = places.amax(dim=0) > 0
    if not bool(cut.any()):
        return torch.ones(len(places), len(places), dtype=torch.bool)
    return (apart[..., cut] == 0).any(dim=-1)


def reads_of(seen: Tensor, device: torch.device) -> list[Reads]:
    """What cells read, those together that read as many; `seen` is (cells, cells)."""
    counts = seen.sum(dim=1)
    found = []
    for count in counts.unique().tolist():
        cells = (counts == count).nonzero()[:, 0]
        keys = seen[cells].nonzero()[:, 1].view(1, len(cells), int(count))
        found.append(Reads(keys.to(device), cells=cells.to(device)))
    return found


@dataclass
class State:
    """One call of the pipeline: cells and what they read, for each grid; None where all is read."""

    found: dict[Grid, tuple[Cells, list[Reads]] | None] = field(default_factory=dict)


class Patterned(Attention):
    """Reads by a pattern of cells that is the same for all steps, layers and heads."""

    cell: int
    cell_frames: int
    dense_steps: int

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        return State()

    def seen(self, places: Tensor) -> Tensor:
        """(cells, cells) what each cell reads; `places` is (cells, 3)."""
        raise NotImplementedError

    def attend(self, state: State, run: Run, call: AttentionCall) -> Tensor:
        """See `Attention.attend`."""
        sample = run.layout.place(call.query.shape[2])
        if sample is None or run.index in run.span(0, self.dense_steps):
            return call.dense()
        start, grid = sample
        if grid not in state.found:
            device = call.query.device
            cells = Cells.of(grid, (self.cell_frames, self.cell, self.cell), device)
            seen = self.seen(cells.places)
            state.found[grid] = None if bool(seen.all()) else (cells, reads_of(seen, device))
        found = state.found[grid]
        if found is None:
            return call.dense()
        return attend(run, self.name, call, found[0], start, found[1])
