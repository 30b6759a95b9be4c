"""Heavy hitters: the entries with the highest running attention, and the newest ones.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
Models" (arXiv 2306.14048), as the plain rival of techniques that score by attention. Query heads
that share a KV head choose together (the paper's models have no such groups; inferred).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hasten.causal.kv.eviction import allowance, recent_of
from hasten.causal.kv.running import Running, RunningScores, Size
from hasten.technique import Card, Contract, Loss, Resource, Rival, Slot, knob, technique

if TYPE_CHECKING:
    from hasten.causal.cache import KVCache


@technique("heavy_hitter")
@dataclass(frozen=True, kw_only=True)
class HeavyHitter(RunningScores):
    """Keeps, per head, the entries that all queries so far attended to most, and the newest ones."""

    card: ClassVar[Card] = Card(
        title="Heavy-hitter eviction (H2O)",
        family="kv_cache",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2306.14048",
        year=2023,
        neutral={"budget": 1.0},
        rival=Rival(
            "random_eviction(budget={budget})", "perplexity", "as many entries, chosen by chance"
        ),
        saves="cache_bytes",
        notes=(
            "The cache's size is fixed by the prompt: budget times its length, however much is "
            "generated, so a short prompt makes a long answer forgetful. Every pass computes its "
            "attention a second time for the scores. running=false freezes the scores after the "
            "prompt: an ablation."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.KV,),
        reads=frozenset({Resource.PROMPT_ATTENTION, Resource.STEP_ATTENTION}),
        changes=frozenset({Resource.KV_ENTRIES, Resource.CACHE_FORK}),
        needs=frozenset({Resource.PROMPT_ATTENTION, Resource.STEP_ATTENTION}),
    )

    budget: float = knob(
        0.25, "share of the prompt's length that the cache may hold", low=0.01, high=1.0
    )
    recent_share: float = knob(
        0.5, "part of the kept entries that are simply the newest", low=0.0, high=1.0
    )
    num_sinks: int = knob(0, "first tokens that always stay (H2O has none)", low=0)
    score: str = knob(
        "sum",
        "attention received in all, or per query that could see the entry",
        choices=("mean", "sum"),
    )
    running: bool = knob(True, "add each decoding step's attention to the scores")

    def sizes(self, state: Running, cache: KVCache, seen: list[int]) -> list[Size | None]:
        """The same size in each layer."""
        total = [allowance(row, self.budget, self.num_sinks + 1) for row in seen]
        return [Size(total, recent_of(total, self.recent_share, self.num_sinks))] * len(
            cache.layers
        )
