"""PrefixKV: one level of retained attention for all layers decides how much each of them keeps.

Wang et al., "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need
for Efficient Generation" (arXiv 2412.03409). Each layer's entries are ranked by the attention they
received; a cache is a prefix of that order, and all prefixes reach the same cumulative mass.

What differs from the released code: it bisects for that mass to within five entries, rescales the
sizes to the budget, and adds the entries that always stay on top. Here they are the first of the
prefix, so that the equal mass is the mass that is really kept, and the sizes are found exactly:
always growing the prefix that has reached the least mass so far is what raising the common level
does, and it also attains the largest possible minimum over the layers. Only the online mode (sizes
from each prompt's own attention) is built; ratios averaged over calibration prompts are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hasten.causal.kv.eviction import (
    ALWAYS,
    FixedSlots,
    RankedOnce,
    allowance,
    deletion_slot,
    kept_indices,
)
from hasten.technique import Card, Claim, Contract, Loss, Resource, Rival, Slot, knob, technique

if TYPE_CHECKING:
    from hasten.causal.cache import KVCache
    from hasten.causal.run import Run


@technique("prefix_kv")
@dataclass(frozen=True, kw_only=True)
class PrefixKV(RankedOnce):
    """Gives each layer as much cache as it needs to retain the same share of its attention."""

    card: ClassVar[Card] = Card(
        title=(
            "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for "
            "Efficient Generation"
        ),
        family="kv_cache",
        loss=Loss.LOSSY,
        paper="prefix_kv",
        link="https://arxiv.org/abs/2412.03409",
        year=2024,
        claims=(Claim("speed-up", 1.8, "LLaVA-1.5-7B at a fifth of the cache (from memory)"),),
        neutral={"budget": 1.0},
        rival=Rival(
            "random_eviction(budget={budget})",
            "perplexity",
            "as many entries, chosen by chance and equally many in each layer",
        ),
        saves="cache_bytes",
        notes=(
            "The budget is the mean over layers; each layer has its own length. While decoding, each "
            "layer keeps its share of all tokens so far and deletes at a fixed place. The prompt's "
            "attention is computed a second time, in chunks, which makes the prefill slower. "
            "allocation=uniform gives every layer the same number: the ablation that isolates what "
            "the paper adds. Four sinks and the newest entry stay even where the budget gives fewer. "
            "In a batch each row has its own sizes, and the unequal rows cost extra copies."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.KV,),
        reads=frozenset({Resource.PROMPT_ATTENTION}),
        changes=frozenset({Resource.KV_ENTRIES, Resource.CACHE_FORK}),
        needs=frozenset({Resource.PROMPT_ATTENTION}),
    )

    budget: float = knob(0.25, "share of the cache that is kept; lower saves more and loses more", low=0.01, high=1.0)
    score: str = knob("mean", "attention per query that could see the entry, or the paper's plain sum", choices=("mean", "sum"))
    num_sinks: int = knob(4, "first tokens that always stay", low=0)
    recent_share: float = knob(0.25, "part of the kept entries that are simply the newest", low=0.0, high=1.0)
    distance: int = knob(-25, "where decoding deletes: entries from the start, or (negative) from the prompt's end")
    allocation: str = knob("prefix", "sizes of the layers: by retained mass, or all the same", choices=("prefix", "uniform"))

    def shrink(self, run: Run, cache: KVCache, scores: list[Tensor], seen: list[int]) -> FixedSlots:
        """Find the layers' sizes for each row, then keep each layer's best entries."""
        layers = len(scores)
        total = [min(row * layers, allowance(row * layers, self.budget, self.least * layers)) for row in seen]
        if self.allocation == "uniform":
            sizes = [[count // layers + (index < count % layers) for count in total] for index in range(layers)]
        else:
            absent = cache.layers[0].positions[:, 0] < 0
            stays = self.must_stay(cache.layers[0], seen)
            sizes = prefix_sizes(torch.stack(scores, dim=1), total, stays[:, 0] & ~absent, absent)
        for layer, score, counts in zip(cache.layers, scores, sizes, strict=True):
            if counts != seen:
                layer.keep(kept_indices(self.chosen(layer, score, seen, counts)))
        # A layer's part of the budget, not count / row: what always stays can be far more than that.
        share = self.budget * layers
        shares = [[share * count / max(1, t) for count, t in zip(counts, total, strict=True)] for counts in sizes]
        slots = [[deletion_slot(count, self.distance, self.num_sinks) for count in counts] for counts in sizes]
        return FixedSlots(shares, slots)


def prefix_masses(scores: Tensor, stays: Tensor, absent: Tensor) -> Tensor:
    """Mass that each layer's prefix of 1, 2, ... entries retains, (batch, layers, length), float64.

    Args:
        scores: (batch, layers, length) attention received.
        stays: (batch, length) entries that stay in any case; they are the prefix's first.
        absent: (batch, length) holes; they are its last and count nothing.
    """
    weights = scores.double().masked_fill(absent[:, None], 0.0)
    order = weights.masked_fill(stays[:, None], ALWAYS).masked_fill(absent[:, None], -1.0)
    ranked = weights.gather(2, order.argsort(dim=2, descending=True, stable=True))
    return ranked.cumsum(dim=2) / ranked.sum(dim=2, keepdim=True)


def prefix_sizes(scores: Tensor, entries: list[int], stays: Tensor, absent: Tensor) -> list[list[int]]:
    """Layer sizes [layer][row] that add up to `entries` in each row and reach one common mass.

    Args:
        scores, stays, absent: as `prefix_masses`.
        entries: (batch,) entries to keep in all layers together.
    """
    batch, layers, length = scores.shape
    masses = prefix_masses(scores, stays, absent)
    # A prefix grows by an entry as long as the mass before that entry is below the level; so the
    # entries with the least mass before them, over all layers, are the ones to keep.
    before = torch.nn.functional.pad(masses[..., :-1], (1, 0))
    always = torch.arange(length, device=scores.device) < stays.sum(dim=1)[:, None, None]
    beyond = torch.arange(length, device=scores.device) >= (~absent).sum(dim=1)[:, None, None]
    before = before.masked_fill(always, -1.0).masked_fill(beyond, math.inf)
    # Rank after rank, so that layers with equal masses take turns.
    flat = before.transpose(1, 2).reshape(batch, length * layers)
    order = flat.argsort(dim=1, stable=True)
    sizes = torch.zeros((layers, batch), dtype=torch.long)
    for row, count in enumerate(entries):
        sizes[:, row] = torch.bincount(order[row, :count] % layers, minlength=layers).cpu()
    result: list[list[int]] = sizes.tolist()
    return result
