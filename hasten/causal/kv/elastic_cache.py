"""Elastic Cache: the prompt's least attended entries are averaged into their nearest neighbours.

Liu et al., "Efficient Inference of Vision Instruction-Following Models with Elastic Cache"
(arXiv 2407.18121). What differs:

- The released code takes `argsort(scores) > count` for a rank, which chooses places rather than
  the best scores; here the best scores stay, as the paper says.
- Three defaults are not the paper's, because its own do worse than chance on text (measured on the
  zoo), where the newest tokens matter most. Plain sums of attention favour early entries, which
  more queries see; so entries are ranked by the attention per query, and a part of the budget goes
  to the newest. Deleting 25 entries before the prompt's end soon deletes the newest part of the
  prompt; so the oldest entry behind the sinks is deleted instead. The paper's way is
  `elastic_cache(score=sum, recent_share=0, distance=-25)`.
- Sinks and newest entries stay as they are: they take no neighbours in. A deletion place that would
  fall among the sinks of a short cache is moved to its middle (both inferred).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hasten.causal.kv.eviction import (
    FixedSlots,
    RankedOnce,
    allowance,
    best,
    deletion_slot,
    kept_indices,
)
from hasten.causal.kv.merging import average_into, nearest_anchor
from hasten.technique import Card, Claim, Contract, Loss, Resource, Rival, Slot, knob, technique

if TYPE_CHECKING:
    from hasten.causal.cache import KVCache, LayerCache
    from hasten.causal.run import Run


@technique("elastic_cache")
@dataclass(frozen=True, kw_only=True)
class ElasticCache(RankedOnce):
    """Keeps the prompt's most attended entries and blurs the others into them; then deletes at a fixed place."""

    card: ClassVar[Card] = Card(
        title="Efficient Inference of Vision Instruction-Following Models with Elastic Cache",
        family="kv_cache",
        loss=Loss.LOSSY,
        paper="elastic_cache",
        link="https://arxiv.org/abs/2407.18121",
        year=2024,
        claims=(
            Claim(
                "speed-up", 1.78, "LLaVA-1.5-13B at a fifth of the cache, upper end (from memory)"
            ),
        ),
        neutral={"budget": 1.0},
        rival=Rival(
            "random_eviction(budget={budget})",
            "perplexity",
            "as many entries, chosen by chance instead of by attention, and nothing merged",
        ),
        saves="cache_bytes",
        notes=(
            "Made for image tokens, whose neighbours are alike; those of text are not, and there "
            "merge=false loses less. score, recent_share and distance are not the paper's defaults, "
            "which lose to chance on text. The share is of all tokens so far: the cache grows by "
            "budget entries a token while decoding. The prompt's attention is computed a second "
            "time, in chunks, which makes the prefill slower. The sinks and the newest entry stay "
            "even where the budget gives fewer."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.KV,),
        reads=frozenset({Resource.PROMPT_ATTENTION}),
        changes=frozenset({Resource.KV_ENTRIES, Resource.CACHE_FORK}),
        needs=frozenset({Resource.PROMPT_ATTENTION}),
    )

    budget: float = knob(
        0.25, "share of the cache that is kept; lower saves more and loses more", low=0.01, high=1.0
    )
    score: str = knob(
        "mean",
        "attention per query that could see the entry, or the paper's plain sum",
        choices=("mean", "sum"),
    )
    num_sinks: int = knob(4, "first tokens that always stay", low=0)
    recent_share: float = knob(
        0.25, "part of the kept entries that are simply the newest", low=0.0, high=1.0
    )
    distance: int = knob(
        4, "where decoding deletes: entries from the start, or (negative) from the prompt's end"
    )
    merge: bool = knob(
        True, "average evicted entries into their neighbours instead of dropping them"
    )

    def shrink(
        self, run: Run, cache: KVCache, received: list[Tensor], seen: list[int]
    ) -> FixedSlots:
        """Keep the same number in each layer; which ones, each layer decides for itself."""
        counts = [min(row, allowance(row, self.budget, self.least)) for row in seen]
        merged = 0
        if counts != seen:
            for layer, attention in zip(cache.layers, received, strict=True):
                keep = best(self.ranks(layer, attention, seen), counts)
                if self.merge:
                    merged += self._merge(layer, keep, seen)
                layer.keep(kept_indices(keep))
        if merged:
            run.activity[f"{self.name}.merged"] += merged
        slots = [deletion_slot(count, self.distance, self.num_sinks) for count in counts]
        layers = len(cache.layers)
        return FixedSlots([[self.budget] * len(seen)] * layers, [slots] * layers)

    def _merge(self, layer: LayerCache, keep: Tensor, seen: list[int]) -> int:
        """Average each evicted entry into the nearest kept one; returns how many were."""
        stays = self.must_stay(layer, seen)
        nearest = nearest_anchor(keep & ~stays)
        moved = ~keep & (layer.positions >= 0) & (nearest >= 0)
        here = torch.arange(layer.length, device=keep.device).expand_as(nearest)
        average_into(layer, torch.where(moved, nearest, here))
        return int(moved.sum())
