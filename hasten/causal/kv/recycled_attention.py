"""Recycled Attention: a full attention step now and then, its most attended entries in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hasten.causal.attention import AttentionView
from hasten.causal.cache import LayerCache
from hasten.causal.kv.reading import Reads, top_entries, visible
from hasten.causal.run import Run
from hasten.causal.slots import KV
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


@dataclass
class Recycled:
    """What one layer remembers of its last full step.

    Attributes:
        chosen: (batch, kv_heads, kept) entries that this step attended to most, -1 for none; None
            if they are all.
        length: entries that it chose from; all later ones are always read.
        query: (batch, heads, head_dim) its query, None unless the schedule compares.
        checked: tokens since the full step at which the query was compared last.
    """

    chosen: Tensor | None
    length: int
    query: Tensor | None
    checked: int = 0


@dataclass
class State:
    """One call: what each layer remembers. A forked cache has new layers and starts afresh."""

    layers: WeakKeyDictionary[LayerCache, Recycled] = field(default_factory=WeakKeyDictionary)
    reads: Reads = field(default_factory=Reads)
    full: int = 0
    recycled: int = 0


@technique("recycled_attention")
@dataclass(frozen=True, kw_only=True)
class RecycledAttention(KV):
    """Reads only what the last full step attended to most, and what came after it.

    A full step attends to the whole cache and chooses, per layer and KV head, the entries with the
    highest attention probability, pooled over the query heads of the KV head (their maximum). The
    passes until the next full step read these and every token generated since. Nothing is evicted,
    so an entry that is passed over can come back at the next full step. The prompt's last row
    chooses for the first passes.

    Source: Recycled Attention (arXiv 2411.05787; the second version is named RefreshKV). No code
    was published. Inferred: pooling by the maximum; that the neighbours of an attended entry are
    read with it (`kernel`, taken from SnapKV; 1 turns it off); that the set grows until the next
    full step; the dynamic schedule's comparison (cosine of the rotated queries, averaged over heads, the row
    that is least alike decides); a block of several queries, such as a draft to verify, reads the
    same set with its own tokens added, so the model that verifies is the recycled one.
    """

    card: ClassVar[Card] = Card(
        title="Recycled Attention: Efficient Inference for Long-Context Language Models",
        family="kv_cache",
        loss=Loss.LOSSY,
        paper="recycled_attention",
        link="https://arxiv.org/abs/2411.05787",
        year=2024,
        claims=(
            Claim(
                "accuracy over that of sinks-and-recent or heavy-hitter eviction, times",
                2.0,
                "RULER at 32K tokens, Llama-3.1-8B and Qwen-2-7B, comparable speed-up",
            ),
        ),
        neutral={"budget": 1.0},
        rival=Rival(
            "random_eviction(budget={budget})",
            "perplexity",
            "keeps as large a share without looking at it",
        ),
        saves="cache_bytes",
        notes=(
            "Saves reading, not memory: the cache stays whole. Full steps read everything, so with "
            "the fixed schedule the mean share read is about 1/stride + (1 - 1/stride) * budget, "
            "and the tokens since the last full step come on top. Without `kernel`, small models "
            "lose the tokens just before a full step, which they need. The stride is not given in what "
            "is public of the paper; 10 is the lower end of what its experiments suggest."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.KV,),
        reads=frozenset({Resource.STEP_ATTENTION}),
        changes=frozenset({Resource.KV_READS}),
        needs=frozenset({Resource.KV_ENTRIES}),
        phase=Phase.PASS,
    )

    budget: float = knob(
        0.125, "share of the cache that a recycled pass reads; less is faster and drifts more",
        low=0.0, high=1.0,
    )  # fmt: skip
    stride: int = knob(
        10, "tokens between full steps, or between the comparisons of the dynamic schedule", low=1
    )
    schedule: str = knob(
        "fixed", "fixed: a full step every stride tokens; dynamic: where the query has changed",
        choices=("fixed", "dynamic"),
    )  # fmt: skip
    kernel: int = knob(
        7, "entries around an attended one that share its score; 1 takes it alone", low=1, high=63
    )
    threshold: float = knob(
        0.8, "dynamic only: full step where the query's cosine to the last full step's is below",
        low=-1.0, high=1.01,
    )  # fmt: skip

    def begin(self, run: Run, bound: Any) -> State:
        """Nothing is remembered yet: the first pass is a full step."""
        return State()

    def read(self, state: State, view: AttentionView) -> Tensor | None:
        """The recycled set with the tokens after it, or None for a full step."""
        if self.budget == 1.0:
            return None
        last = state.layers.get(view.layer)
        if view.is_prompt or last is None or self._is_due(last, view):
            state.layers[view.layer] = self._choose(view)
            chosen = None
        else:
            chosen = _with_later(last, view)
        if not view.is_prompt:
            state.reads.add(view, chosen)
            state.full += chosen is None
            state.recycled += chosen is not None
        return chosen

    def finish(self, state: State, run: Run) -> None:
        """Report the reads; a full or recycled read is one layer in one pass."""
        if state.reads.report(run, self.name):
            run.activity[f"{self.name}.full_reads"] += state.full
            run.activity[f"{self.name}.recycled_reads"] += state.recycled

    def _is_due(self, last: Recycled, view: AttentionView) -> bool:
        """Whether this pass is a full step for this layer."""
        since = view.layer.length - view.query.shape[2] + 1 - last.length
        if self.schedule == "fixed":
            return since >= self.stride
        if since - last.checked < self.stride:
            return False
        last.checked = since
        assert last.query is not None
        alike = nn.functional.cosine_similarity(
            view.query[:, :, -1].float(), last.query.float(), dim=-1
        )
        return bool(alike.mean(dim=1).min() < self.threshold)

    def _choose(self, view: AttentionView) -> Recycled:
        """The entries that this full step attends to most."""
        block, length = view.query.shape[2], view.layer.length
        query = view.query[:, :, -1] if self.schedule == "dynamic" else None
        if block > 1 and not view.is_prompt:
            # Some of a verified draft may be rejected: choose from what was there before it, for
            # whichever of its rows turns out to be the last.
            length -= block
            if length == 0:
                return Recycled(None, 0, query)
        weights = view.probabilities(block - 1 if view.is_prompt else 0)[..., :length]
        real = (view.positions[:, -weights.shape[2] :] >= 0)[:, None, :, None]
        pooled = (weights * real).amax(dim=2).unflatten(1, (-1, view.groups)).amax(dim=2)
        if self.kernel > 1:
            padding = self.kernel // 2
            around = nn.functional.max_pool1d(pooled, self.kernel, stride=1, padding=padding)
            # Neighbours share one score; their own decides which of them come first. (An even
            # kernel gives one entry more.)
            pooled = around[..., :length] + 1e-3 * pooled
        seen = visible(view)
        if seen is not None:
            seen = seen[:, :, -weights.shape[2] :, :length].any(dim=2)
        return Recycled(top_entries(pooled, seen, self.budget), length, query)


def _with_later(last: Recycled, view: AttentionView) -> Tensor | None:
    """The chosen entries and all later ones, (batch, kv_heads, read)."""
    if last.chosen is None:
        return None
    later = torch.arange(last.length, view.layer.length, device=last.chosen.device)
    return torch.cat((last.chosen, later.expand(*last.chosen.shape[:2], -1)), dim=2)
