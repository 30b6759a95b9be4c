"""What a model that sees blocks need not compute twice, and many drafts of a text in one sequence.

Such a model looks at its own block and those before it. So the keys and values of a position stand as
long as no token of its block, or of one before, changes; and what two drafts have in common up to some
block is the same in both. Nothing here is an approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hasten.masked.buffers import ALL_LAYERS, Buffers
from hasten.masked.host import Bools, Ints, fetched, sent

NEVER = -1  # no token: nothing was computed there


def first_changes(changed: Bools, block_length: int, pads: Ints) -> list[int]:
    """Where the first block begins that holds a change, in any row of the batch; or the length.

    Args:
        changed: (batch, texts, length) bool; one answer for each of the texts.
        pads: (batch,) positions on the left that are only padding; blocks are counted from there.
    """
    pads = pads[:, None]
    start = (changed.argmax(axis=2) - pads) // block_length * block_length + pads
    start = np.where(changed.any(axis=2), np.maximum(start, 0), changed.shape[2])
    return start.min(axis=0).tolist()  # type: ignore[no-any-return]


class BlockStore(Buffers):
    """Keys and values of a text (batch, length), and of which tokens they were computed.

    Attributes:
        block_length: positions of a block.
        pads: (batch,) array, positions on the left that are only padding; blocks are counted from there.
        seen: (batch, length) array, the token at each position when it was computed, or NEVER.
    """

    def __init__(self, tokens: Tensor, block_length: int, pads: Tensor) -> None:
        super().__init__(tokens.shape[1])
        self.block_length = block_length
        self.pads: Ints = fetched(pads)
        self.seen: Ints = np.full(tuple(tokens.shape), NEVER, dtype=np.int64)
        self._span = (0, 0)  # the positions of the pass in flight
        self._tree = False
        # What the last tree computed, (layers, 2, batch, kv_heads, rows, head_dim).
        self._fresh: Tensor | None = None

    def stale(self, tokens: Tensor) -> int:
        """The first position of any row that must be computed for a text (batch, length)."""
        changed = fetched(tokens) != self.seen
        (first,) = first_changes(changed[:, None], self.block_length, self.pads)
        return first

    def end(self, column: int) -> int:
        """The end of the block that holds a position, in the row where it ends last."""
        return self.block_ends([column])[0]

    def block_ends(self, columns: list[int]) -> list[int]:
        """As `end`, of many positions."""
        ends = self._ends(np.array(columns)).max(axis=0)
        return np.minimum(ends, self.length).tolist()  # type: ignore[no-any-return]

    def _ends(self, columns: Ints) -> Ints:
        """(batch, columns) where the blocks of positions end in each row."""
        size, pads = self.block_length, self.pads[:, None]
        ends: Ints = ((columns - pads) // size + 1) * size + pads
        return ends

    def _whole(self, columns: Ints, end: Ints | int) -> Bools:
        """(batch, columns) bool, whether all of a position's block stands before `end`.

        Rows are padded each its own way, so a pass may end inside a block of some of them. What it
        says there has not seen the rest of the block.
        """
        whole: Bools = np.minimum(self._ends(columns), self.length) <= end
        return whole

    def expect(self, first: int, end: int, tokens: Tensor) -> None:
        """The next pass computes the positions from `first` up to `end` of a text (batch, length)."""
        self._span, self._tree = (first, end), False
        whole = self._whole(np.arange(first, end), end)
        self.seen[:, first:end] = np.where(whole, fetched(tokens[:, first:end]), NEVER)

    def expect_tree(self, first: int) -> None:
        """The next pass computes a `Tree` that begins at `first`; nothing is kept until `adopt`."""
        self._span, self._tree, self._fresh = (first, first), True, None

    def write(self, layer: int | slice, fresh: Tensor) -> None:
        """See `Buffers.write`."""
        states = self.room(fresh)
        first, end = self._span
        if not self._tree:
            states[layer][..., first:end, :] = fresh
        elif layer == ALL_LAYERS:
            self._fresh = fresh
        else:
            if self._fresh is None:
                self._fresh = fresh.new_empty(states.shape[0], *fresh.shape)
            self._fresh[layer] = fresh

    def read(self, layer: int) -> Tensor:
        """See `Buffers.read`."""
        assert self.states is not None
        first, end = self._span
        if not self._tree:
            return self.states[layer][..., :end, :]
        assert self._fresh is not None
        return torch.cat((self.states[layer][..., :first, :], self._fresh[layer]), dim=-2)

    def columns(self, visible: Tensor | None, rows: int) -> tuple[Tensor | None, Tensor | None]:
        """See `Buffers.columns`."""
        assert visible is not None
        first = self._span[0]
        return visible[..., :first], visible[..., first:]

    def adopt(self, tree: Tree, drafts: Tensor, best: Tensor) -> None:
        """Keep what the last tree computed for one of the drafts (batch, drafts, length) of each row."""
        assert self.states is not None and self._fresh is not None
        chosen = fetched(best)
        rows = tree.owner[chosen]  # (batch, width)
        end = tree.first + rows.shape[1]
        index = sent(np.maximum(rows, 0), best.device)
        for entry in range(len(chosen)):
            self.states[:, :, entry, :, tree.first : end] = self._fresh[:, :, entry].index_select(
                -2, index[entry]
            )
        ends = tree.first + (rows >= 0).sum(axis=1, keepdims=True)  # of the draft of each row
        whole = self._whole(np.arange(tree.first, end), ends)
        kept = fetched(drafts)[np.arange(len(chosen)), chosen, tree.first : end]
        self.seen[:, tree.first : end] = np.where(whole, kept, NEVER)
        self._fresh = None


@dataclass(frozen=True)
class Tree:
    """Several drafts of a text in one sequence of `rows`, what they have in common only once.

    Attributes:
        first: the position at which the rows begin; what stands before is the same in all drafts.
        tokens: (batch, rows) the ids of the rows.
        columns: (rows,) the position in the text of each row.
        draft: (rows,) the draft whose tokens it holds.
        owner: (drafts, width) for each draft the row of each position from `first` on; -1 for none.
    """

    first: int
    tokens: Ints
    columns: Ints
    draft: Ints
    owner: Ints

    @classmethod
    def of(
        cls, drafts: Ints, first: int, ends: Sequence[int], block_length: int, pads: Ints
    ) -> Tree:
        """The tree of drafts (batch, drafts, length).

        A draft computes its positions from the first block on in which it differs from the draft
        before it, in any row of the batch; what stands before is that draft's.

        Args:
            first: the first position to be computed of any draft.
            ends: where each draft ends, not falling.
            pads: (batch,) positions on the left that are only padding.
        """
        changed = drafts[:, 1:] != drafts[:, :-1]
        starts = [first, *first_changes(changed, block_length, pads)]
        first = starts[0] = min(starts)
        width = max(ends) - first
        columns: list[int] = []
        draft: list[int] = []
        owner: list[list[int]] = []
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            shared: list[int] = []
            if owner:
                start = min(start, ends[index - 1])  # what that draft lacks is not shared
                shared = owner[-1][: min(start, end) - first]
            rows = range(len(columns), len(columns) + max(0, end - start))
            line = [*shared, *rows]
            owner.append(line + [-1] * (width - len(line)))
            columns += range(start, start + len(rows))
            draft += [index] * len(rows)
        return cls(
            first, drafts[:, draft, columns], np.array(columns), np.array(draft), np.array(owner)
        )

    def visible(self, blocks: Bools) -> Bools:
        """Bool (batch or 1, 1, rows, first + rows), True where a row may look.

        Args:
            blocks: (batch or 1, 1, rows, length) bool, what each row may see of a text alone.
        """
        rows = np.arange(len(self.columns))
        mine = self.owner[self.draft][:, self.columns - self.first] == rows
        own = blocks[..., self.columns] & mine
        return np.concatenate((blocks[..., : self.first], own), axis=-1)
