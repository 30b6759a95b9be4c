"""A language model as one function: what it says of places of a partly masked text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.masked.blocks import BlockStore, Tree
from hasten.masked.host import Bools, Ints, fetched, sent
from hasten.masked.projections import Projections
from hasten.masked.runners import EagerRunner, Look, Runner, Said
from hasten.subject import MaskedForm


class Denoiser:
    """Runs a model over a partly masked text.

    Attributes:
        passes: forward passes so far.
        positions: positions computed in them, batch entries counted apart.
    """

    def __init__(
        self, model: PreTrainedModel, form: MaskedForm, runner: Runner | None = None
    ) -> None:
        """`runner`: what executes the passes of the model; by default it runs as it is."""
        self.form = form
        self.runner = EagerRunner(model) if runner is None else runner
        self.passes = 0
        self.positions = 0

    @torch.no_grad()
    def read(
        self,
        tokens: Tensor,
        wanted: Tensor,
        *,
        pads: Tensor | None = None,
        cache: Projections | BlockStore | None = None,
        rows: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Said:
        """What the model says of some places, (batch, wanted); never the mask.

        Args:
            tokens: (batch, length) ids, masks among them.
            wanted: (wanted,) places, ascending.
            pads: (batch,) positions on the left that are only padding.
            cache: where keys and values are kept; a `BlockStore` finds out itself which positions must
                be computed, and takes no `rows`.
            rows: (rows,) positions to compute, ascending; the others are read from `cache`. They
                must hold the sources of `wanted` (`sources`). None computes all.
            embeddings: (batch, rows, hidden) to be read instead of the tokens' own.
        """
        length = tokens.shape[1]
        source = self.sources(wanted)
        alone = self.alone(wanted, pads)
        if alone is not None:
            source = torch.cat((source, wanted)).unique()
        positions = torch.arange(length, device=tokens.device)[None].expand(tokens.shape[0], -1)
        if pads is not None:
            positions = (positions - pads[:, None]).clamp(min=0)
        if isinstance(cache, BlockStore):
            assert rows is None and embeddings is None
            first = min(cache.stale(tokens), int(source[0]))
            end = cache.end(int(source[-1]))
            cache.expect(first, end, tokens)
            tokens, positions = tokens[:, first:end], positions[:, first:end]
            looking, seen = np.arange(first, end), end
            kept = source - first
        elif rows is not None:
            assert cache is not None and not cache.is_empty, "the first pass is over all rows"
            tokens, positions = tokens[:, rows], positions[:, rows]
            looking, seen = fetched(rows), length
            kept = torch.searchsorted(rows, source)
        else:
            looking, seen = np.arange(length), length
            kept = source
        visible = self._visible(looking, seen, None if pads is None else fetched(pads))
        if isinstance(cache, Projections):
            cache.rows = rows
        said = self.runner.read(
            Look(
                tokens,
                positions,
                kept,
                self.form.mask_id,
                None if visible is None else sent(visible, tokens.device),
                cache,
                embeddings,
            )
        )
        self.passes += 1
        self.positions += tokens.numel()
        if alone is not None:
            speaker = torch.where(alone, wanted, self.sources(wanted))  # (batch, wanted)
            entries = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
            said = said[entries, torch.searchsorted(source, speaker)]
        return said

    @torch.no_grad()
    def drafts(
        self,
        drafts: Tensor,
        first: int,
        ends: list[int],
        store: BlockStore,
    ) -> tuple[Said, Tree, Ints]:
        """What a model that sees blocks says of several drafts, all in one sequence.

        Args:
            drafts: (batch, drafts, length) ids.
            first: the first place that is asked for.
            ends: for each draft the end of the places that are asked for, not falling.
            store: what earlier passes computed; it changes once `adopt` is called.

        Returns:
            What is said of the rows that were asked, the tree, and (drafts, places) which of the rows
            speaks of a draft's place, from `first` to the last of `ends`. Of a place at or behind a
            draft's own end speaks the next draft that has it; -1 is nobody.
        """
        pads, device = store.pads, drafts.device
        wanted = range(first, ends[-1])
        source = [max(place - 1, 0) for place in wanted] if self.form.shifted else wanted
        begin = min(store.stale(drafts[:, 0]), source[0])
        whole = store.block_ends([end - 1 for end in ends])
        tree = Tree.of(fetched(drafts), begin, whole, store.block_length, pads)
        row, kept = _speakers(tree, wanted, source, ends)
        visible = self._visible(tree.columns, drafts.shape[2], pads)
        assert visible is not None  # a model that sees blocks does not see all
        store.expect_tree(tree.first)
        positions = np.maximum(tree.columns - pads[:, None], 0)
        said = self.runner.read(
            Look(
                sent(tree.tokens, device),
                sent(positions, device),
                torch.tensor(kept, device=device),
                self.form.mask_id,
                sent(tree.visible(visible), device),
                store,
            )
        )
        self.passes += 1
        self.positions += drafts.shape[0] * len(tree.columns)
        return said, tree, np.array(row)

    def alone(self, wanted: Tensor, pads: Tensor | None) -> Tensor | None:
        """(batch, wanted) bool, first places behind padding, which nobody speaks for; None if none."""
        if not self.form.shifted or pads is None:
            return None
        first = (wanted == pads[:, None]) & (pads[:, None] > 0)
        return first if bool(first.any()) else None

    def sources(self, wanted: Tensor) -> Tensor:
        """Positions whose output is about the wanted places; the first speaks for itself."""
        return (wanted - 1).clamp(min=0) if self.form.shifted else wanted

    def _visible(self, looking: Ints, length: int, pads: Ints | None) -> Bools | None:
        """Bool (batch or 1, 1, rows, length), True where a row may look; None hides nothing.

        Args:
            looking: (rows,) the positions of the rows.
        """
        columns = np.arange(length)[None]
        looking, own = looking[None], columns
        visible: Bools | None = None
        if pads is not None and (pads > 0).any():
            # A row of padding sees itself, or it would become NaN.
            itself = looking[0, :, None] == columns
            visible = (columns >= pads[:, None])[:, None, None] | itself
            # Blocks are counted from a row's first token, so that padding moves nothing.
            looking, own = looking - pads[:, None], columns - pads[:, None]
        size = self.form.block_length
        if size is not None:
            before = (looking[:, :, None] // size >= (own // size)[:, None])[:, None]
            visible = before if visible is None else visible & before
        return visible


def _speakers(
    tree: Tree, wanted: Sequence[int], source: Sequence[int], ends: Sequence[int]
) -> tuple[list[list[int]], list[int]]:
    """Which rows of a tree are asked.

    Returns:
        For each draft and each of the wanted places the index of its speaker among those that are
        asked, or -1; and the rows that are asked, ascending.
    """
    speaker = [[-1] * len(wanted)]
    for line, end in zip(reversed(tree.owner.tolist()), reversed(ends), strict=True):
        speaker.append(
            [
                line[position - tree.first] if place < end else later
                for place, position, later in zip(wanted, source, speaker[-1], strict=True)
            ]
        )
    found = speaker[:0:-1]
    asked = sorted({row for line in found for row in line} - {-1})
    index = {row: number for number, row in enumerate(asked)} | {-1: -1}
    return [[index[row] for row in line] for line in found], asked
