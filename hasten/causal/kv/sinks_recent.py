"""Sinks and a window: the first tokens and the newest ones stay, whatever they say.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453), as a
plain rival. StreamingLLM renumbers positions inside the cache, so that a model may run beyond its
context; here keys keep the positions they were computed at, as in the other techniques.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hasten.causal.kv.eviction import FixedSlots, hold, rows_seen
from hasten.causal.slots import KV
from hasten.technique import Card, Contract, Loss, Resource, Rival, Slot, knob, technique

if TYPE_CHECKING:
    from hasten.causal.cache import KVCache
    from hasten.causal.run import Run


@technique("sinks_recent")
@dataclass(frozen=True, kw_only=True)
class SinksRecent(KV):
    """Keeps the first tokens and the newest ones; reads no attention at all."""

    card: ClassVar[Card] = Card(
        title="Attention sinks and a window of recent tokens (StreamingLLM)",
        family="kv_cache",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2309.17453",
        year=2023,
        neutral={"budget": 1.0},
        rival=Rival(
            "random_eviction(budget={budget})", "perplexity", "as many entries, chosen by chance"
        ),
        saves="cache_bytes",
        notes=(
            "The window grows by budget entries a token. What lies before it is lost, so a name "
            "defined far back cannot be recalled, however good the perplexity looks. Keeps no state, "
            "so its caches may be forked."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.KV,), changes=frozenset({Resource.KV_ENTRIES})
    )

    budget: float = knob(
        0.25, "share of the cache that is kept; lower saves more and loses more", low=0.01, high=1.0
    )
    num_sinks: int = knob(4, "first tokens that always stay", low=0)

    def compress(self, state: Any, run: Run, cache: KVCache) -> None:
        """Delete behind the sinks what is beyond the share; the same places in all layers."""
        if self.budget == 1.0:
            return
        layers, seen = len(cache.layers), rows_seen(run)
        fixed = FixedSlots(
            [[self.budget] * len(seen)] * layers, [[self.num_sinks] * len(seen)] * layers
        )
        evicted = hold(cache, seen, fixed, self.num_sinks + 1)
        if evicted:
            run.activity[f"{self.name}.evicted"] += evicted
