"""PrefixKV: one level of retained attention for all layers decides how much each of them keeps.

Wang et al., "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need
for Efficient Generation" (arXiv 2412.03409). Each layer's entries are ranked by the attention they
received; a cache is a prefix of that order, and all prefixes reach the same cumulative mass.

What differs:

- The released code bisects for the common mass to within five entries, rescales the sizes to the
  budget, and adds the entries that always stay on top. Here those are the first of the prefix, so
  that the equal mass is the mass that is really kept, and the sizes are found exactly: growing the
  prefix that has reached the least mass so far is what raising the common level does, and it also
  attains the largest possible minimum over the layers.
- Three defaults are not the paper's, because its own do no better than chance on text (measured on
  the zoo); `elastic_cache`, which shares them, says why. The mass is that of the plain sums in any
  case. The paper's way is `prefix_kv(score=sum, recent_share=0, distance=-25)`.
- Only the online mode (sizes from each prompt's own attention) is built; ratios averaged over
  calibration prompts are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.causal.kv.eviction import (
    ALWAYS,
    FixedSlots,
    RankedOnce,
    allowance,
    best,
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
            "layer keeps its share of all tokens so far and deletes at a fixed place. "
            "allocation=uniform gives every layer the same number: the ablation that isolates what "
            "the paper adds. It retains less attention in the worst layer, but in the small models "
            "of the zoo it does not lose more likelihood. score, recent_share and distance are not "
            "the paper's defaults, which do not beat chance on text. The prompt's attention is "
            "computed a second time, in chunks, which makes the prefill slower. The sinks and the "
            "newest entry stay even where the budget gives fewer. In a batch each row has its own "
            "sizes, and the unequal rows cost extra copies."
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
    allocation: str = knob(
        "prefix",
        "sizes of the layers: by retained mass, or all the same",
        choices=("prefix", "uniform"),
    )

    def shrink(
        self, run: Run, cache: KVCache, received: list[Tensor], seen: list[int]
    ) -> FixedSlots:
        """Find the layers' sizes for each row, then keep each layer's best entries."""
        layers = len(received)
        total = [
            min(row * layers, allowance(row * layers, self.budget, self.least * layers))
            for row in seen
        ]
        ranks = [
            self.ranks(layer, x, seen) for layer, x in zip(cache.layers, received, strict=True)
        ]
        must = (ranks[0] == ALWAYS)[:, 0].sum(dim=1)
        if self.allocation == "uniform":
            sizes = [
                [count // layers + (index < count % layers) for count in total]
                for index in range(layers)
            ]
        else:
            sizes = prefix_sizes(torch.stack(received, dim=1), torch.cat(ranks, dim=1), total, must)
        for layer, rank, counts in zip(cache.layers, ranks, sizes, strict=True):
            if counts != seen:
                layer.keep(kept_indices(best(rank, counts)))
        # A layer's part of the budget, not count / row: what always stays can be far more than that.
        share = self.budget * layers
        shares = [
            [share * count / max(1, t) for count, t in zip(counts, total, strict=True)]
            for counts in sizes
        ]
        slots = [
            [deletion_slot(count, self.distance, self.num_sinks) for count in counts]
            for counts in sizes
        ]
        return FixedSlots(shares, slots)


def prefix_masses(received: Tensor, ranks: Tensor) -> Tensor:
    """Attention that each layer's prefix of 1, 2, ... entries retains, (batch, layers, length).

    It is a share of what all of the layer's entries received, in float64.

    Args:
        received: (batch, layers, length) attention that each entry received.
        ranks: (batch, layers, length) the higher, the earlier in the prefix; -inf for holes.
    """
    weights = received.double().masked_fill(ranks == -math.inf, 0.0)
    ordered = weights.gather(2, ranks.argsort(dim=2, descending=True, stable=True))
    return ordered.cumsum(dim=2) / ordered.sum(dim=2, keepdim=True)


def prefix_sizes(
    received: Tensor, ranks: Tensor, entries: list[int], least: Tensor
) -> list[list[int]]:
    """Layer sizes [layer][row] that add up to `entries` in each row and reach one common mass.

    Args:
        received, ranks: as `prefix_masses`.
        entries: (batch,) entries to keep in all layers together.
        least: (batch,) entries to keep in each layer in any case.
    """
    batch, layers, length = received.shape
    masses = prefix_masses(received, ranks)
    # A prefix grows by an entry as long as the mass before that entry is below the level; so the
    # entries with the least mass before them, over all layers, are the ones to keep.
    before = F.pad(masses[..., :-1], (1, 0))
    place = torch.arange(length, device=received.device)
    before = before.masked_fill(place < least[:, None, None], -1.0)
    before = before.masked_fill(place >= (ranks != -math.inf).sum(dim=2, keepdim=True), math.inf)
    # Rank after rank, so that layers with equal masses take turns.
    flat = before.transpose(1, 2).reshape(batch, length * layers)
    order = flat.argsort(dim=1, stable=True)
    sizes = torch.zeros((layers, batch), dtype=torch.long)
    for row, count in enumerate(entries):
        sizes[:, row] = torch.bincount(order[row, :count] % layers, minlength=layers).cpu()
    result: list[list[int]] = sizes.tolist()
    return result
