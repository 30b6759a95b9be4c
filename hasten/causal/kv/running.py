"""Running attention scores per head, as H2O keeps them: the base of heavy_hitter and d2o."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.causal.kv.eviction import (
    ALWAYS,
    fills_empty_cache,
    is_roomy,
    kept_indices,
    must_stay,
    remove_slots,
    rows_held,
    rows_seen,
)
from hasten.causal.slots import KV

if TYPE_CHECKING:
    from hasten.causal.attention import AttentionView
    from hasten.causal.cache import KVCache, LayerCache
    from hasten.causal.run import Run


@dataclass
class Size:
    """What each row of one layer may hold in all, and how many newest of them always stay."""

    total: list[int]
    recent: list[int]


@dataclass
class Running:
    """One call of a technique with running scores.

    Attributes:
        scores: (batch, kv_heads, length) attention that each entry has received so far.
        pending: (batch, kv_heads, block, length) attention rows of the pass in flight. They count
            once the pass is committed, and only the rows that were.
        sizes: what was decided per layer for each cache whose prompt is through; None for a layer
            that is never compressed.
        evicted: entries taken out, summed over layers and rows.
    """

    scores: dict[LayerCache, Tensor] = field(default_factory=dict)
    pending: dict[LayerCache, Tensor] = field(default_factory=dict)
    sizes: dict[KVCache, list[Size | None]] = field(default_factory=dict)
    evicted: int = 0


class RunningScores(KV):
    """Base: every entry's score is the attention it received from all queries since it came.

    Scores are kept per KV head, summed over the query heads that share it. The size of a layer is
    fixed once after the prompt; from then on each new entry pushes out the one with the lowest
    score, sinks and recent ones excepted.
    """

    budget: float
    score: str
    num_sinks: int
    running: bool

    def begin(self, run: Run, bound: Any) -> Running | None:
        """No state at a budget of 1: then nothing is watched and nothing touched."""
        return Running() if self.budget < 1.0 else None

    def observe(self, state: Running | None, view: AttentionView) -> None:
        """Sum up the prompt's attention; note a decoding pass's rows until it is committed."""
        if state is None:
            return
        if fills_empty_cache(view):
            received = view.received()
            self.watch_prompt(state, view, received)
            state.scores[view.layer] = _pooled(received[:, :, None], view.groups)[:, :, 0]
            state.pending.pop(view.layer, None)
        elif self.running and view.layer in state.scores:
            rows = _pooled(view.probabilities(), view.groups)
            if view.layer.table.has_holes:
                rows = rows * (view.positions >= 0)[:, None, :, None]
            state.pending[view.layer] = rows

    def compress(self, state: Running | None, run: Run, cache: KVCache) -> None:
        """Count the committed rows, then evict down to each layer's size."""
        if state is None:
            return
        seen = rows_seen(run)
        for layer in cache.layers:
            if layer in state.scores:
                state.scores[layer] = _absorbed(
                    state.scores[layer], state.pending.pop(layer, None), layer.length, cache.kept
                )
        if cache not in state.sizes:
            state.sizes[cache] = self.sizes(state, cache, seen)
        for layer, size in zip(cache.layers, state.sizes[cache], strict=True):
            if size is None:
                state.scores.pop(layer, None)  # never compressed, so never watched again
            else:
                self._evict(state, cache, layer, size, seen)

    def finish(self, state: Running | None, run: Run) -> None:
        """Publish the counters."""
        if state is not None and state.evicted:
            run.activity[f"{self.name}.evicted"] += state.evicted

    # -- what the techniques decide ----------------------------------------------------------------
    def watch_prompt(self, state: Any, view: AttentionView, received: Tensor) -> None:
        """See the prompt's attention, (batch, heads, length), in one layer."""

    def sizes(self, state: Any, cache: KVCache, seen: list[int]) -> list[Size | None]:
        """Decide the layers' sizes after the prompt."""
        raise NotImplementedError

    def before_removal(self, state: Any, layer: LayerCache, evicted: Tensor) -> None:
        """Entries (batch, kv_heads, evicted; -1 for none) are about to go; may merge them first."""

    # -- eviction --------------------------------------------------------------------------------
    def _evict(
        self, state: Running, cache: KVCache, layer: LayerCache, size: Size, seen: list[int]
    ) -> None:
        over = [max(0, h - t) for h, t in zip(rows_held(layer), size.total, strict=True)]
        most = max(over)
        if most == 0:
            return
        state.evicted += sum(over)
        scores = state.scores[layer]
        ranked = scores
        if self.score == "mean":
            ends = torch.tensor(seen, device=scores.device)[:, None, None]
            ranked = scores / (ends - layer.positions).clamp(min=1)
        ranked = ranked.masked_fill(must_stay(layer, seen, self.num_sinks, size.recent), ALWAYS)
        if layer.table.has_holes:
            ranked = ranked.masked_fill(layer.positions < 0, math.inf)
        if most == min(over) == 1 and not is_roomy(layer, 1):
            evicted = ranked.argmin(dim=-1, keepdim=True)
            self.before_removal(state, layer, evicted)
            remove_slots(cache, layer, evicted)
            scores.scatter_(2, evicted, scores[:, :, -1:].clone())
            state.scores[layer] = scores[:, :, :-1]
            return
        counts = torch.tensor(over, device=scores.device)[:, None, None]
        lowest = ranked.argsort(dim=-1, stable=True)[..., :most]
        ranks = torch.arange(most, device=scores.device)
        outside = layer.length  # sorts behind every index
        evicted = lowest.masked_fill(ranks >= counts, outside).sort(dim=-1).values
        gone = torch.zeros((*scores.shape[:2], outside + 1), dtype=torch.bool, device=scores.device)
        gone = gone.scatter_(2, evicted, True)[..., :outside]
        self.before_removal(state, layer, evicted.masked_fill(evicted == outside, -1))
        kept = kept_indices((layer.positions >= 0) & ~gone)
        layer.keep(kept)
        state.scores[layer] = scores.gather(2, kept.clamp(min=0)).masked_fill(kept < 0, 0.0)


def _pooled(attention: Tensor, groups: int) -> Tensor:
    """Sum over the query heads that share a KV head: (batch, heads, rows, length)."""
    if groups == 1:
        return attention
    batch, heads, rows, length = attention.shape
    return attention.view(batch, heads // groups, groups, rows, length).sum(dim=2)


def _absorbed(scores: Tensor, rows: Tensor | None, length: int, kept: Tensor | None) -> Tensor:
    """Scores after a pass: those before it plus the attention of the rows that were committed.

    Args:
        scores: (batch, kv_heads, entries before the pass).
        rows: (batch, kv_heads, block, entries before + block), or None where nothing was watched.
        length: entries now; the last ones are what the pass left.
        kept: (batch, left) which rows of the block were kept, -1 for none; None for the first ones.
    """
    before = scores.shape[2]
    new = length - before
    if rows is None or new == 0:
        return F.pad(scores, (0, new))
    if kept is None:
        total = rows[:, :, :new].sum(dim=2)[..., :length]
        total[..., :before] += scores
        return total
    index = kept.clamp(min=0)[:, None, :].expand(-1, rows.shape[1], -1)
    real = (kept >= 0)[:, None, :]
    taken = rows.gather(2, index[..., None].expand(-1, -1, -1, rows.shape[3]))
    total = (taken * real[..., None]).sum(dim=2)
    columns = total.gather(2, before + index) * real
    return torch.cat((scores + total[..., :before], columns), dim=2)
