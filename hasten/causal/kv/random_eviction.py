"""Random eviction: what any way of choosing entries must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hasten.causal.kv.eviction import (
    ALWAYS,
    allowance,
    best,
    kept_indices,
    must_stay,
    recent_of,
    remove_range,
    rows_held,
    rows_seen,
)
from hasten.causal.slots import KV
from hasten.technique import Card, Contract, Loss, Resource, Slot, knob, technique

if TYPE_CHECKING:
    from hasten.causal.cache import KVCache
    from hasten.causal.run import Run


@technique("random_eviction")
@dataclass(frozen=True, kw_only=True)
class RandomEviction(KV):
    """Keeps a random part of the cache, drawn for each layer by itself."""

    card: ClassVar[Card] = Card(
        title="Random eviction",
        family="kv_cache",
        loss=Loss.LOSSY,
        neutral={"budget": 1.0},
        saves="cache_bytes",
        notes=(
            "The lower bound for techniques that choose. It spares the same sinks and newest entry as "
            "they do, since without the first tokens a model breaks down whatever else is kept, and "
            "holds the same share of all tokens while decoding. Rows of a batch share one stream of "
            "chance, so a row alone keeps other entries than in a batch."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.KV,), changes=frozenset({Resource.KV_ENTRIES})
    )

    budget: float = knob(
        0.25, "share of the cache that is kept; lower saves more and loses more", low=0.01, high=1.0
    )
    num_sinks: int = knob(4, "first tokens that always stay", low=0)
    recent_share: float = knob(
        0.0, "part of the kept entries that are simply the newest", low=0.0, high=1.0
    )
    seed: int = knob(0, "seed of the choice", low=0)

    def begin(self, run: Run, bound: Any) -> torch.Generator:
        """A generator of its own: sampling is not disturbed, and a call repeats itself."""
        return torch.Generator().manual_seed(self.seed)

    def compress(self, state: torch.Generator, run: Run, cache: KVCache) -> None:
        """Evict at random what is beyond the share."""
        if self.budget == 1.0:
            return
        seen = rows_seen(run)
        counts = [allowance(row, self.budget, self.num_sinks + 1) for row in seen]
        recent = recent_of(counts, self.recent_share, self.num_sinks)
        for layer in cache.layers:
            held = rows_held(layer)
            over = [max(0, have - count) for have, count in zip(held, counts, strict=True)]
            if not any(over):
                continue
            if len(seen) == 1 and over[0] == 1:
                spread = layer.length - self.num_sinks - recent[0]
                place = self.num_sinks + int(torch.randint(spread, (1,), generator=state))
                remove_range(cache, layer, [place], over)
            else:
                luck = torch.rand((len(seen), 1, layer.length), generator=state).to(
                    layer.keys.device
                )
                luck = luck.masked_fill(must_stay(layer, seen, self.num_sinks, recent), ALWAYS)
                luck = luck.masked_fill(layer.positions < 0, -math.inf)
                stay = [have - gone for have, gone in zip(held, over, strict=True)]
                layer.keep(kept_indices(best(luck, stay)))
            run.activity[f"{self.name}.evicted"] += sum(over)
