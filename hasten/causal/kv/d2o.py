"""D2O: layers with flat attention keep more, and evicted entries are folded into similar ones.

Wan et al., "D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large
Language Models" (arXiv 2406.13035). Per head, the entries with the highest running attention stay
beside the sinks and the newest ones; an evicted entry whose key is much like a kept key is merged
into it, any other is dropped. The bar for "much like" follows the mean similarity.

What differs from the released code, which is a port of the paper:

- It leaves the first two layers and the last one whole on top of the budget. Here `budget` is the
  share of the whole cache: whole layers are paid from it, and there are only as many as a quarter
  of it pays for, because the others starve otherwise.
- Its merge divides by a full count what it weighs by a similarity below one, which shrinks entries
  with each merge (`merge=scaled`); the default is the paper's form, whose weights add up to one.
- Entries are ranked by the attention per query that could see them. Plain sums (`score=sum`, as in
  paper and code) favour early entries and lose more on text (measured on the zoo).
- It expands KV heads to query heads before caching; here the query heads that share a KV head
  choose together, which keeps the saving of grouped attention (inferred).

As in the code, the variances of a layer's heads are scaled to 0..1 within the layer before their
mean is compared between layers, so it is the heads' differences that count and not how flat the
layer is as a whole. Scaling over the layers instead, as the paper can be read, was tried and did
clearly worse on the zoo: raw variance follows the weight of the very first token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hasten.causal.kv.eviction import allowance, recent_of
from hasten.causal.kv.merging import fold_into, most_similar
from hasten.causal.kv.running import Running, RunningScores, Size
from hasten.technique import Card, Claim, Contract, Loss, Resource, Rival, Slot, knob, technique

if TYPE_CHECKING:
    from typing import Any

    from hasten.causal.attention import AttentionView
    from hasten.causal.cache import KVCache, LayerCache
    from hasten.causal.run import Run

SMALLEST_SHARE = 0.01  # of a layer, whatever the other layers need


@dataclass
class State(Running):
    """One call of D2O.

    Attributes:
        variance: (batch, heads) variance over the prompt's entries of the attention they received.
        bars: (batch,) moving mean of the similarities, above which an entry is merged.
        merged: how many entries were (a tensor, so that counting waits for nothing).
    """

    variance: dict[LayerCache, Tensor] = field(default_factory=dict)
    bars: dict[LayerCache, Tensor] = field(default_factory=dict)
    merged: Tensor | int = 0


@technique("d2o")
@dataclass(frozen=True, kw_only=True)
class D2O(RunningScores):
    """Evicts by running attention per head, merges what is like a kept entry, sizes layers by flatness."""

    card: ClassVar[Card] = Card(
        title="D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language Models",
        family="kv_cache",
        loss=Loss.LOSSY,
        paper="d2o",
        link="https://arxiv.org/abs/2406.13035",
        year=2024,
        claims=(Claim("throughput", 3.0, "Llama models with the reduced cache, lower end"),),
        neutral={"budget": 1.0},
        rival=Rival(
            "random_eviction(budget={budget})", "perplexity", "as many entries, chosen by chance"
        ),
        saves="cache_bytes",
        notes=(
            "The cache's size is fixed by the prompt: budget times its length, however much is "
            "generated. Every pass computes its attention a second time for the scores, and each "
            "eviction compares keys: time is saved where caches are long, not in a small model. "
            "merge=scaled is the released code's, merge=drop only evicts, score=sum is the paper's "
            "ranking, which does worse on text."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.KV,),
        reads=frozenset({Resource.PROMPT_ATTENTION, Resource.STEP_ATTENTION}),
        changes=frozenset({Resource.KV_ENTRIES, Resource.CACHE_FORK}),
        needs=frozenset({Resource.PROMPT_ATTENTION, Resource.STEP_ATTENTION}),
    )

    budget: float = knob(
        0.25, "mean share of the prompt's length that a layer may hold", low=0.01, high=1.0
    )
    recent_share: float = knob(
        0.5, "part of the kept entries that are simply the newest", low=0.0, high=1.0
    )
    num_sinks: int = knob(4, "first tokens that always stay", low=0)
    num_whole: int = knob(
        3,
        "layers that are never compressed (first, second, last), as far as a quarter of the budget pays",
        low=0,
        high=3,
    )
    allocation: str = knob(
        "variance",
        "sizes of the layers: by the variance of their attention, or all the same",
        choices=("variance", "uniform"),
    )
    merge: str = knob(
        "normalised",
        "weights of a merge: the paper's, the code's, or no merge",
        choices=("normalised", "scaled", "drop"),
    )
    threshold: float | None = knob(
        None, "fixed similarity from which on is merged; none follows the mean"
    )
    smoothing: float = knob(
        0.5, "weight of the old bar when a new mean similarity comes", low=0.0, high=1.0
    )
    score: str = knob(
        "mean",
        "attention per query that could see the entry, or the paper's plain sum",
        choices=("mean", "sum"),
    )
    running: bool = knob(True, "add each decoding step's attention to the scores")

    def begin(self, run: Run, bound: Any) -> State | None:
        """No state at a budget of 1: then nothing is watched and nothing touched."""
        return State() if self.budget < 1.0 else None

    def finish(self, state: Any, run: Run) -> None:
        """Publish the counters."""
        super().finish(state, run)
        if state is not None and int(state.merged):
            run.activity[f"{self.name}.merged"] += int(state.merged)

    # -- layers ----------------------------------------------------------------------------------
    def watch_prompt(self, state: State, view: AttentionView, received: Tensor) -> None:
        """Note how unevenly the prompt's entries are attended to, head by head."""
        real = (view.positions >= 0)[:, None, :]
        count = real.sum(dim=2).clamp(min=1)
        mean = (received * real).sum(dim=2) / count
        squares = ((received - mean[..., None]) * real).square().sum(dim=2)
        state.variance[view.layer] = squares / (count - 1).clamp(min=1)

    def sizes(self, state: State, cache: KVCache, seen: list[int]) -> list[Size | None]:
        """The flatter a layer's attention, the more it keeps; whole layers keep everything."""
        variance = torch.stack([state.variance.pop(layer) for layer in cache.layers], dim=1)
        whole = whole_layers(len(cache.layers), self.budget, self.num_whole)
        rest = [index for index in range(len(cache.layers)) if index not in whole]
        flatness = -unevenness(variance)[:, rest]
        if self.allocation == "uniform":
            flatness = torch.zeros_like(flatness)
        shares = layer_shares(flatness, self.budget * len(cache.layers) - len(whole)).tolist()
        sizes: list[Size | None] = [None] * len(cache.layers)
        for place, index in enumerate(rest):
            rows = zip(seen, shares, strict=True)
            total = [allowance(row, share[place], self.num_sinks + 1) for row, share in rows]
            sizes[index] = Size(total, recent_of(total, self.recent_share, self.num_sinks))
        return sizes

    # -- entries ---------------------------------------------------------------------------------
    def before_removal(self, state: State, layer: LayerCache, evicted: Tensor) -> None:
        """Fold those evicted entries into kept ones that are at least as alike as the bar asks.

        As in the code, the i-th evicted entries of all heads are merged or dropped together, by
        their mean similarity.
        """
        if self.merge == "drop":
            return
        absent = layer.positions < 0 if layer.table.has_holes else None
        alike, target = most_similar(layer.keys, evicted, absent)
        real = evicted >= 0
        mean = alike.mean(dim=1)  # (batch, evicted); rows have the same number in all heads
        bar = self._bar(state, layer, mean, real[:, 0])
        taken = ((mean >= bar[:, None]) & real[:, 0])[:, None, :].expand_as(alike)
        if self.merge == "scaled":
            fold_into(layer, evicted, target, alike * taken, taken.float(), own=1.0)
        else:
            weight = alike.exp() * taken
            fold_into(layer, evicted, target, weight, weight, own=math.e)
        state.merged = state.merged + taken[:, 0].sum()

    def _bar(self, state: State, layer: LayerCache, mean: Tensor, real: Tensor) -> Tensor:
        """(batch,) similarity from which on entries are merged, after this eviction's own mean."""
        if self.threshold is not None:
            return torch.full_like(mean[:, 0], self.threshold)
        current = (mean * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)
        old = state.bars.get(layer)
        if old is None:
            old = torch.full_like(current, math.nan)  # a row that has not evicted anything yet
        moved = torch.where(
            old.isnan(), current, self.smoothing * old + (1 - self.smoothing) * current
        )
        state.bars[layer] = torch.where(real.any(dim=1), moved, old)
        return state.bars[layer]


def whole_layers(num_layers: int, budget: float, most: int) -> list[int]:
    """Layers that are never compressed: of the first, the second and the last what is affordable."""
    candidates = list(dict.fromkeys((0, 1, num_layers - 1)))
    return candidates[: min(most, int(budget * num_layers / 4))]


def unevenness(variance: Tensor) -> Tensor:
    """F of each layer, (batch, layers), 0 to 1, from the variances (batch, layers, heads)."""
    low, high = variance.amin(dim=2, keepdim=True), variance.amax(dim=2, keepdim=True)
    return ((variance - low) / (high - low).clamp(min=1e-12)).mean(dim=2)


def layer_shares(flatness: Tensor, total: float) -> Tensor:
    """Share of its length that each layer keeps: softmax(flatness), scaled to add up to `total`.

    No layer keeps more than all of its entries; what is over goes to the others.

    Args:
        flatness: (batch, layers), higher keeps more.
        total: layers' worth of entries to keep together.
    """
    layers = flatness.shape[1]
    weights, order = flatness.double().softmax(dim=1).sort(dim=1, descending=True)
    # With the m heaviest layers whole, the others share total - m by weight. The right m is the
    # smallest for which the heaviest of the others does not get more than everything.
    rest = weights.flip(1).cumsum(dim=1).flip(1)  # weight of this layer and all lighter ones
    whole = torch.arange(layers, device=flatness.device)
    scale = (total - whole) / rest
    fits = scale * weights <= 1.0
    first = fits.int().argmax(dim=1, keepdim=True)
    shares = (scale.gather(1, first) * weights).masked_fill(whole < first, 1.0)
    shares = torch.zeros_like(shares).scatter_(1, order, shares)
    return shares.clamp(min=SMALLEST_SHARE, max=1.0)
