"""A language model as one function: logits for places of a partly masked text."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.masked.blocks import BlockStore, Tree
from hasten.masked.projections import Projections
from hasten.masked.runners import EagerRunner, Look, Runner
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
    def logits(
        self,
        tokens: Tensor,
        wanted: Tensor,
        *,
        pads: Tensor | None = None,
        cache: Projections | BlockStore | None = None,
        rows: Tensor | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """What the model says of some places: (batch, wanted, vocabulary) float32, never the mask.

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
        visible = self._visible(length, pads, rows, tokens.device)
        if isinstance(cache, BlockStore):
            assert rows is None and embeddings is None and visible is not None
            first = min(cache.stale(tokens), int(source.min()))
            end = cache.end(int(source.max()))
            cache.expect(first, end, tokens)
            tokens, positions = tokens[:, first:end], positions[:, first:end]
            visible = visible[:, :, first:end, :end]
            kept = source - first
        elif rows is not None:
            assert cache is not None and not cache.is_empty, "the first pass is over all rows"
            tokens, positions = tokens[:, rows], positions[:, rows]
            kept = torch.searchsorted(rows, source)
        else:
            kept = source
        if isinstance(cache, Projections):
            cache.rows = rows
        logits = self.runner.logits(Look(tokens, positions, kept, visible, cache, embeddings))
        self.passes += 1
        self.positions += tokens.numel()
        if alone is not None:
            speaker = torch.where(alone, wanted, self.sources(wanted))  # (batch, wanted)
            entries = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
            logits = logits[entries, torch.searchsorted(source, speaker)]
        logits = logits.float()
        logits[..., self.form.mask_id] = -torch.inf
        return logits

    @torch.no_grad()
    def drafts(
        self,
        drafts: Tensor,
        first: int,
        ends: list[int],
        store: BlockStore,
    ) -> tuple[Tensor, Tree, Tensor]:
        """What a model that sees blocks says of several drafts, all in one sequence.

        Args:
            drafts: (batch, drafts, length) ids.
            first: the first place that is asked for.
            ends: for each draft the end of the places that are asked for, not falling.
            store: what earlier passes computed; it changes once `adopt` is called.

        Returns:
            Logits (batch, rows, vocabulary) float32 of what was asked for, the tree, and (drafts,
            places) which of the rows speaks of a draft's place, from `first` to the last of `ends`. Of
            a place at or behind a draft's own end speaks the next draft that has it; -1 is nobody.
        """
        pads = store.pads
        wanted = torch.arange(first, ends[-1], device=drafts.device)
        source = self.sources(wanted)
        begin = min(store.stale(drafts[:, 0]), int(source[0]))
        whole = [store.end(end - 1) for end in ends]
        tree = Tree.of(drafts, begin, whole, store.block_length, pads)
        blocks = self._visible(drafts.shape[2], pads, None, drafts.device)
        assert blocks is not None
        asked = wanted < torch.tensor(ends, device=drafts.device)[:, None]
        row = tree.owner[:, source - tree.first].masked_fill(~asked, -1)
        for draft in range(len(ends) - 2, -1, -1):
            row[draft] = torch.where(row[draft] < 0, row[draft + 1], row[draft])
        kept, where = row.unique(return_inverse=True)
        nobody = int(kept[0] < 0)
        store.expect_tree(tree.first)
        positions = (tree.columns[None] - pads[:, None]).clamp(min=0)
        said = self.runner.logits(
            Look(tree.tokens(drafts), positions, kept[nobody:], tree.visible(blocks), store)
        )
        self.passes += 1
        self.positions += drafts.shape[0] * len(tree.columns)
        said = said.float()
        said[..., self.form.mask_id] = -torch.inf
        return said, tree, where - nobody

    def alone(self, wanted: Tensor, pads: Tensor | None) -> Tensor | None:
        """(batch, wanted) bool, first places behind padding, which nobody speaks for; None if none."""
        if not self.form.shifted or pads is None:
            return None
        first = (wanted == pads[:, None]) & (pads[:, None] > 0)
        return first if bool(first.any()) else None

    def sources(self, wanted: Tensor) -> Tensor:
        """Positions whose output is about the wanted places; the first speaks for itself."""
        return (wanted - 1).clamp(min=0) if self.form.shifted else wanted

    def _visible(
        self, length: int, pads: Tensor | None, rows: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Bool mask (batch or 1, 1, rows or 1, length), True where a row may look; None for all."""
        columns = torch.arange(length, device=device)[None]
        visible = None
        if pads is not None and bool((pads > 0).any()):
            visible = (columns >= pads[:, None])[:, None, None]
            # A row of padding sees itself, or it would become NaN.
            visible = visible | torch.eye(length, dtype=torch.bool, device=device)[None, None]
        if self.form.block_length is not None:
            # Counted from a row's first token, so that padding moves nothing.
            shown = columns if visible is None or pads is None else columns - pads[:, None]
            blocks = shown // self.form.block_length
            before = (blocks[:, :, None] >= blocks[:, None])[:, None]
            visible = before if visible is None else visible & before
        if visible is not None and rows is not None and visible.shape[2] > 1:
            visible = visible[:, :, rows]
        return visible
