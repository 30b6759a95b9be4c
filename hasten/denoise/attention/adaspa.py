"""AdaSpa: key blocks are searched for exactly at two steps, and the steps between reuse what was found.

"Training-free and Adaptive Sparse Attention for Efficient Long Video Generation" (arXiv 2502.21079),
after the paper. Which blocks of the attention matter differs between prompts, layers and heads but
hardly between steps. A search sums the softmax over each block; the second one takes the sums of
exponentiated scores of the first, and so makes output and masses in one pass.

Ours: half of the heads, those that lose least, leave out more, the others less, so that the mean is
the given sparsity. The text is read by all and reads all, and a block of queries always reads its own.
Each branch of guidance is searched by itself. PyTorch's attention does not tell its sums, so the first
search computes scores once beside it, and a search holds whole rows of scores where a kernel of its own
would not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.attention.masses import (
    Masses,
    best_blocks,
    budgets,
    pooled,
    recall,
    search,
)
from hasten.denoise.attention.sparse import Cells, Reads, Sequences, attend, whole
from hasten.denoise.blocks import AttentionCall
from hasten.denoise.layout import Grid
from hasten.denoise.run import Run
from hasten.denoise.slots import Attention
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Phase,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)

Place = tuple[int, int, int, int]
"""Which network, which of the step's calls, which attention layer, and which of its turns."""


@dataclass(frozen=True)
class Found:
    """What a search found in one attention layer.

    Attributes:
        keys: (batch, heads, query blocks, most) key blocks by falling mass, as int16 if that does.
        kept: (batch, heads) how many of them each head keeps.
        lse: (batch, heads, query blocks, size) sums of exponentiated scores, as their logs.
        rows: which rows of the pipeline's call they are of.
        reads: the same as the attention takes it.
    """

    keys: Tensor
    kept: Tensor
    lse: Tensor | None
    rows: tuple[int, ...]
    reads: tuple[Reads, ...]

    @classmethod
    def of(cls, keys: Tensor, kept: Tensor, lse: Tensor | None, rows: tuple[int, ...]) -> Found:
        """Put heads together that keep as many."""
        flat, counts = keys.flatten(0, 1), kept.flatten()
        reads = []
        for count in counts.unique().tolist():
            items = (counts == count).nonzero()[:, 0]
            reads.append(Reads(flat[items][..., : int(count)], items=items))
        return cls(keys, kept, lse, rows, tuple(reads))

    def fitted(self, run: Run) -> Found | None:
        """The same for the rows that the network's call holds; None where it lacks some."""
        if self.rows == run.rows:
            return self
        keys, kept = run.fit(self.keys, self.rows), run.fit(self.kept, self.rows)
        if keys is None or kept is None:
            return None
        lse = None if self.lse is None else run.fit(self.lse, self.rows)
        return Found.of(keys, kept, lse, run.rows)


@dataclass
class State:
    """One call of the pipeline.

    Attributes:
        step: the step in hand; `searches`: how many were made, that of this step too.
        searching: whether the step in hand is one of a search.
        found: what was found, by attention layer.
        cells: blocks of the tokens, by their number.
    """

    luck: torch.Generator
    step: int = -1
    searches: int = 0
    searching: bool = False
    found: dict[Place, Found] = field(default_factory=dict)
    cells: dict[int, Cells] = field(default_factory=dict)


@technique("adaspa")
@dataclass(frozen=True, kw_only=True)
class AdaSpa(Attention):
    """Reads the key blocks that got most of the softmax when it was last looked at as a whole."""

    card: ClassVar[Card] = Card(
        title=(
            "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation (AdaSpa)"
        ),
        paper="adaspa",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2502.21079",
        year=2025,
        claims=(
            Claim("speed-up", 1.78, "HunyuanVideo, 8 s at 720p, end to end"),
            Claim("speed-up", 1.66, "CogVideoX1.5-5B, end to end"),
            Claim("speed-up, at most", 4.01, "HunyuanVideo, 24 s"),
        ),
        neutral={"sparsity": 0.0},
        rival=Rival(
            "adaspa(sparsity={sparsity}, block={block}, first={first}, second={second}, choose=random)",
            "psnr",
            "as many blocks at the same steps, drawn by chance",
        ),
        saves="attention",
        notes=(
            "Steps before the first search are as they were, so it does nothing in samplers of few steps. "
            "A gain in time needs attention to be a large share of it, so many tokens. A search computes "
            "scores beside the dense attention. Memory: two bytes for each block read, by layer and head, "
            "and four for each query."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.ATTENTION,),
        # What a search finds is read at later steps: it holds for the sample and the tokens searched.
        needs=frozenset({Resource.TRAJECTORY, Resource.TOKEN_SET}),
        phase=Phase.PASS,
    )

    sparsity: float = knob(
        0.8, "share of the key blocks that is left out, over all heads", low=0.0, high=1.0
    )
    block: int = knob(64, "tokens of a block, in the order of the sequence", low=1)
    first: int = knob(10, "step of 50 of the first search; those before are dense", low=0, high=49)
    second: int = knob(30, "step of 50 of the second one; none if not behind the first", low=0)
    adaptive: bool = knob(True, "heads that lose less leave out more; else all the same share")
    choose: str = knob(
        "exact",
        "how blocks are found: by their share of the softmax; by the mean query and key of blocks; by "
        "chance. The last two are ablations",
        choices=("exact", "pooled", "random"),
    )
    seed: int = knob(0, "seed of the random choice", low=0)

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        return State(torch.Generator().manual_seed(self.seed))

    def most(self, shares: Any) -> float:
        """How many times cheaper attention gets at most, for long sequences and many steps."""
        left = self.first / 50 + (1.0 - self.first / 50) * (1.0 - self.sparsity)
        return 1.0 / left if left else float("inf")

    def attend(self, state: State, run: Run, call: AttentionCall) -> Tensor:
        """See `Attention.attend`."""
        if state.step != run.index:
            self._begin_step(state, run)
        if self.sparsity == 0.0 or not state.searches:
            return call.dense()
        sample = run.layout.place(call.query.shape[2])
        if sample is None:
            return call.dense()
        start, grid = sample
        cells = self._cells(state, grid, call)
        if self.keep(cells.count) == cells.count:
            return call.dense()
        where = (id(run.call.module), run.call.branch, call.layer, call.turn)
        found = state.found.get(where)
        found = None if found is None else found.fitted(run)
        if found is None or state.searching:
            return self._search(state, run, call, cells, start, where, found)
        return attend(run, self.name, call, cells, start, found.reads)

    def keep(self, blocks: int) -> int:
        """How many of so many key blocks a query block reads, over all heads."""
        return max(1, round((1.0 - self.sparsity) * blocks))

    def _begin_step(self, state: State, run: Run) -> None:
        """A search that is due is made at the first step at which the network runs."""
        state.step = run.index
        steps = [self.first] + ([self.second] if self.second > self.first else [])
        due = sum(run.index >= run.span(0, step).stop for step in steps)
        state.searching, state.searches = due > state.searches, due

    def _cells(self, state: State, grid: Grid, call: AttentionCall) -> Cells:
        tokens = grid[0] * grid[1] * grid[2]
        if tokens not in state.cells:
            state.cells[tokens] = Cells.of((tokens,), (self.block,), call.query.device)
        return state.cells[tokens]

    def _search(
        self,
        state: State,
        run: Run,
        call: AttentionCall,
        cells: Cells,
        start: int,
        where: Place,
        before: Found | None,
    ) -> Tensor:
        """Find the blocks to read, and give the dense attention of this step."""
        parts = Sequences.of(call, cells, start)
        if parts is None:
            return call.dense()
        batch, heads = call.query.shape[:2]
        known = before.lse.flatten(0, 1) if before is not None and before.lse is not None else None
        masses = self._masses(state, parts, cells, known)
        count = self.keep(cells.count)
        kept = torch.full((batch, heads), count, device=call.query.device)
        if self.adaptive and self.choose == "exact":
            recalls = recall(masses, count, cells).unflatten(0, (batch, heads))
            kept = budgets(recalls, count, cells.count)
        keys = best_blocks(masses.blocks, int(kept.max())).to(index_dtype(cells.count))
        lse = masses.lse.unflatten(0, (batch, heads)) if self.choose == "exact" else None
        state.found[where] = Found.of(keys.unflatten(0, (batch, heads)), kept, lse, run.rows)
        run.activity[f"{self.name}.searches"] += 1
        if masses.output is None:
            return call.dense()
        return whole(call, masses.output, cells, start)

    def _masses(self, state: State, parts: Sequences, cells: Cells, lse: Tensor | None) -> Masses:
        if self.choose == "exact":
            return search(parts, cells, lse)
        blocks = pooled(parts, cells)
        if self.choose == "random":
            blocks = torch.rand(blocks.shape, generator=state.luck).to(blocks.device)
        return Masses(blocks, blocks.new_zeros(blocks.shape[:2]), blocks.new_zeros(0))


def index_dtype(blocks: int) -> torch.dtype:
    """The smallest integers that number so many blocks; there are many of them to keep."""
    return torch.int16 if blocks <= torch.iinfo(torch.int16).max else torch.int32
