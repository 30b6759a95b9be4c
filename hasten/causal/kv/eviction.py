"""What evicting techniques share: how much may stay, which entries, and taking the rest out.

Counts are per row of the batch, because rows of different length (left padding) keep different
numbers; a place in a buffer that a row does not use is a hole (position -1), which is never
counted, never chosen and never attended to. Kept keys stay rotated for the position they were
computed at, and new tokens use their true positions; the released code of these papers is silent
on that point, so it is inferred.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.causal.cache import GROWTH
from hasten.causal.slots import KV

if TYPE_CHECKING:
    from typing import Any

    from hasten.causal.attention import AttentionView
    from hasten.causal.cache import KVCache, LayerCache
    from hasten.causal.run import Run

ROUNDING = 1e-9  # a share of 0.3 of 10 tokens is 3 of them, whatever floating point says
ALWAYS = 1e30  # the score of an entry that must stay


# ------------------------------------------------------------------------------------- how many
def rows_seen(run: Run) -> list[int]:
    """Tokens of each row that the current lane's cache has taken in, padding not counted."""
    seen: list[int] = (run.lane.filled - run.pads).tolist()
    return seen


def rows_held(layer: LayerCache) -> list[int]:
    """Entries that each row has in a layer (per head, the same for all heads)."""
    if not layer.table.has_holes:
        return [layer.length] * int(layer.table.buffer.shape[0])
    held: list[int] = (layer.positions[:, 0] >= 0).sum(dim=1).tolist()
    return held


def allowance(seen: int, share: float, least: int) -> int:
    """Entries that may stay of `seen` tokens: the share, rounded up, and `least` at the least."""
    return max(least, math.ceil(seen * share - ROUNDING))


def recent_of(counts: list[int], share: float, num_sinks: int) -> list[int]:
    """How many of each row's entries are simply the newest: at least one, and sinks come first."""
    return [max(1, min(int(count * share), count - num_sinks)) for count in counts]


# ------------------------------------------------------------------------------------- which ones
def must_stay(layer: LayerCache, seen: list[int], num_sinks: int, recent: list[int]) -> Tensor:
    """Mask (batch, heads or 1, length) of the first tokens, of each row's newest ones, and of holes.

    It goes by original positions, so the entries may stand in any order.
    """
    positions = layer.positions
    edges = [row - newest for row, newest in zip(seen, recent, strict=True)]
    edge = torch.tensor(edges, device=positions.device)[:, None, None]
    return (positions < num_sinks) | (positions >= edge)


def best(scores: Tensor, counts: list[int]) -> Tensor:
    """Mask of each row's `counts` highest scores, earlier entries first among equals.

    Args:
        scores: (batch, heads, length); -inf for holes.
        counts: (batch,) how many stay.
    """
    ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < torch.tensor(counts, device=scores.device)[:, None, None]


def kept_indices(keep: Tensor) -> Tensor:
    """Indices of the True entries in their order, (batch, heads, most), for `LayerCache.keep`.

    Rows that keep fewer than others get holes (-1) in front, where left padding stands too.
    """
    counts = keep.sum(dim=-1, keepdim=True)
    most = int(counts.max())
    order = keep.to(torch.uint8).argsort(dim=-1, stable=True)[..., keep.shape[-1] - most :]
    empty = torch.arange(most, device=keep.device) < most - counts
    return order.masked_fill(empty, -1)


# ----------------------------------------------------------------------------------- taking out
def is_roomy(layer: LayerCache, coming_out: int) -> bool:
    """Whether a layer's buffers would be so much too long that they are worth reallocating."""
    return layer.buffers[0].shape[2] > layer.length - coming_out + 2 * GROWTH


def remove_range(cache: KVCache, layer: LayerCache, starts: list[int], counts: list[int]) -> None:
    """Take `counts` entries from the `starts`-th entry on out of each row; the order stays.

    A few entries are closed over in place, in buffers that the coming tokens fill again; otherwise
    the layer is reallocated, which frees what it does not need.
    """
    if not any(counts):
        return
    same = len(set(starts)) == 1 and len(set(counts)) == 1 and not layer.table.has_holes
    if same and not is_roomy(layer, counts[0]):
        _close_gap(cache, layer, starts[0], counts[0])
        return
    real = (layer.positions >= 0)[:, :1]
    place = real.cumsum(dim=-1) - 1  # of an entry within its row
    first = torch.tensor(starts, device=place.device)[:, None, None]
    count = torch.tensor(counts, device=place.device)[:, None, None]
    gone = (place >= first) & (place < first + count)
    layer.keep(kept_indices(real & ~gone))


def _close_gap(cache: KVCache, layer: LayerCache, start: int, count: int) -> None:
    own_table(cache, layer, heads=1)
    end = layer.length
    for part in (layer.keys, layer.values, layer.positions[..., None]):
        part[:, :, start : end - count] = part[:, :, start + count : end].clone()
    layer.length -= count
    layer.table.length -= count


def remove_slots(cache: KVCache, layer: LayerCache, slots: Tensor) -> None:
    """Take one entry per row and head out in place: `slots` (batch, kv_heads, 1).

    The last entry moves into the gap, which costs the same however long the cache is. Order means
    nothing to a cache: masks are made from positions.
    """
    own_table(cache, layer, heads=slots.shape[1])
    last = layer.length - 1
    for part in (layer.keys, layer.values, layer.positions[..., None]):
        index = slots[..., None].expand(-1, -1, -1, part.shape[3])
        part.scatter_(2, index, part[:, :, last:].clone())
    layer.length = last
    layer.table.length = last


def own_table(cache: KVCache, layer: LayerCache, heads: int) -> None:
    """Give a layer its own position table, with a line per head where `heads` is not 1."""
    if sum(other.table is layer.table for other in cache.layers) > 1:
        layer.table = layer.table.copy()
    buffer = layer.table.buffer
    if buffer.shape[1] < heads:
        layer.table.buffer = buffer.expand(-1, heads, -1).clone()


# --------------------------------------------------------------------- a fixed place of deletion
@dataclass
class FixedSlots:
    """What each layer may hold and where it deletes when it holds more: [layer][row] each."""

    shares: list[list[float]]
    slots: list[list[int]]


def deletion_slot(held: int, distance: int, num_sinks: int) -> int:
    """The entry at which a cache that held `held` entries after the prompt deletes from then on.

    A positive distance counts from the start and a negative one from the end. A place before the
    start or among the sinks is moved to the middle (PrefixKV's rule, here for both papers).
    """
    slot = distance if distance > 0 else held + distance
    return slot if num_sinks <= slot < held else max(num_sinks, held // 2)


def hold(cache: KVCache, seen: list[int], fixed: FixedSlots, least: int) -> int:
    """Delete at the fixed places what the layers hold too much; returns the entries deleted."""
    evicted = 0
    for layer, shares, slots in zip(cache.layers, fixed.shares, fixed.slots, strict=True):
        rows = zip(rows_held(layer), seen, shares, strict=True)
        over = [max(0, held - allowance(row, share, least)) for held, row, share in rows]
        remove_range(cache, layer, slots, over)
        evicted += sum(over)
    return evicted


@dataclass
class Ranked:
    """One call of a technique that ranks the prompt's entries once.

    Attributes:
        received: (batch, length) attention that the prompt's entries received, until it is used.
        fixed: what was decided for each cache whose prompt is through.
    """

    received: dict[LayerCache, Tensor] = field(default_factory=dict)
    fixed: dict[KVCache, FixedSlots] = field(default_factory=dict)


class RankedOnce(KV):
    """Base: ranks the prompt's entries by attention received, then deletes at a fixed place.

    Entry j of a layer has received the sum over queries i >= j of the mean over heads of A[i, j],
    the same for all heads; with `score=mean` it is ranked by that sum over the number of queries.
    """

    budget: float
    score: str
    num_sinks: int
    recent_share: float

    def begin(self, run: Run, bound: Any) -> Ranked | None:
        """No state at a budget of 1: then nothing is watched and nothing touched."""
        return Ranked() if self.budget < 1.0 else None

    def observe(self, state: Ranked | None, view: AttentionView) -> None:
        """Sum up the prompt's attention, once for each cache."""
        if state is not None and fills_empty_cache(view):
            state.received[view.layer] = view.received().mean(dim=1)

    def compress(self, state: Ranked | None, run: Run, cache: KVCache) -> None:
        """Shrink after the prompt, then keep to each layer's share."""
        if state is None:
            return
        seen = rows_seen(run)
        if cache in state.fixed:
            evicted = hold(cache, seen, state.fixed[cache], self.least)
        else:
            before = sum(sum(rows_held(layer)) for layer in cache.layers)
            received = [state.received.pop(layer) for layer in cache.layers]
            state.fixed[cache] = self.shrink(run, cache, received, seen)
            evicted = before - sum(sum(rows_held(layer)) for layer in cache.layers)
        if evicted:
            run.activity[f"{self.name}.evicted"] += evicted

    @property
    def least(self) -> int:
        """Entries that stay in each layer whatever the budget says."""
        return self.num_sinks + 1

    def shrink(
        self, run: Run, cache: KVCache, received: list[Tensor], seen: list[int]
    ) -> FixedSlots:
        """Evict after the prompt; `received` is the attention (batch, length) of each layer's entries."""
        raise NotImplementedError

    def must_stay(self, layer: LayerCache, seen: list[int]) -> Tensor:
        """Mask (batch, heads or 1, length) of sinks, of the newest part of the budget, and of holes."""
        counts = [allowance(row, self.budget, self.least) for row in seen]
        return must_stay(
            layer, seen, self.num_sinks, recent_of(counts, self.recent_share, self.num_sinks)
        )

    def ranks(self, layer: LayerCache, received: Tensor, seen: list[int]) -> Tensor:
        """What entries are ranked by, (batch, heads or 1, length): what must stay first, holes last."""
        scores = received[:, None]
        if self.score == "mean":
            ends = torch.tensor(seen, device=received.device)[:, None, None]
            scores = scores / (ends - layer.positions)
        scores = scores.masked_fill(self.must_stay(layer, seen), ALWAYS)
        return scores.masked_fill(layer.positions < 0, -math.inf)


def fills_empty_cache(view: AttentionView) -> bool:
    """Whether this pass is the first on its cache (the prompt, or another model catching up)."""
    return view.layer.length == view.query.shape[2]
