"""Caches, calls and drafts for the tests of techniques that evict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten.causal.cache import KVCache, LayerCache
from hasten.causal.run import Run
from hasten.causal.slots import KV, Draft, Drafter
from hasten.plan import Plan
from hasten.technique import Card, Contract, Loss, Slot, Technique
from tests import models

GREEDY = {"do_sample": False, "eos_token_id": -1}

EVICTING = ["prefix_kv", "elastic_cache", "d2o", "heavy_hitter", "sinks_recent", "random_eviction"]


def cache_of(keys: Tensor, values: Tensor | None = None, *, pads: Tensor | None = None) -> KVCache:
    """A committed cache of one layer that holds keys (batch, heads, length, head_dim) and values."""
    batch, _, length, _ = keys.shape
    pads = torch.zeros(batch, dtype=torch.long) if pads is None else pads
    positions = (torch.arange(length) - pads[:, None]).clamp(min=-1)
    cache = KVCache(1, batch, length + 8, keys.device)
    cache.open_block(positions, has_holes=bool(pads.any()))
    cache.layers[0].update(keys, keys if values is None else values)
    cache.commit()
    return cache


def called(
    model: PreTrainedModel,
    *plan: str | Technique,
    inputs: Tensor | dict[str, Tensor],
    new: int = 1,
    **more: Any,
) -> Run:
    """Generate greedily and return the call with the caches as they were at its end."""
    inputs = {"input_ids": inputs} if isinstance(inputs, Tensor) else inputs
    with hasten.apply(model, *plan) as fast:
        arguments = {"max_new_tokens": new, **GREEDY, **more}
        run = fast._run(inputs["input_ids"], inputs.get("attention_mask"), arguments)
        fast._execute(run)
    return run


def states(run: Run) -> Any:
    """The kv technique's state at the end of a call."""
    assert run.slots.kv is not None
    return run.state(run.slots.kv)


def held(layer: LayerCache, row: int = 0, head: int = 0) -> list[int]:
    """Positions that a layer holds, in the order in which they lie there, holes left out."""
    positions = layer.positions
    return [p for p in positions[row, min(head, positions.shape[1] - 1)].tolist() if p >= 0]


@contextmanager
def watched(kind: type[KV], after: Any) -> Iterator[None]:
    """Call `after(state, run, cache)` behind each `compress` of a technique."""
    original = kind.compress

    def compress(self: KV, state: Any, run: Run, cache: KVCache) -> None:
        original(self, state, run, cache)
        after(state, run, cache)

    kind.compress = compress  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.compress = original  # type: ignore[method-assign]


def attended(query: Tensor, layer: LayerCache) -> Tensor:
    """Attention output (batch, heads, queries, head_dim) over what a layer holds."""
    scores = query @ layer.keys.transpose(2, 3) * query.shape[3] ** -0.5
    hole = (layer.positions < 0)[:, :, None, :]
    return scores.masked_fill(hole, float("-inf")).softmax(dim=-1) @ layer.values


@dataclass(frozen=True, kw_only=True)
class Oracle(Drafter):
    """Drafts a tree of which the path that `truth` tells is accepted, and nothing else.

    The nodes are a wrong token, the right one, and the same again below the right one. A row of
    `truth` that is all wrong has nothing accepted, so that rows get out of step.
    """

    name: ClassVar[str] = "oracle"
    card: ClassVar[Card] = Card(title="Oracle", family="decoding", loss=Loss.EXACT)
    contract: ClassVar[Contract] = Contract(slots=(Slot.DRAFTER,))
    truth: ClassVar[Tensor] = torch.zeros((1, 1), dtype=torch.long)  # (batch, prompt and all new)

    def propose(self, state: Any, run: Run) -> Draft | None:
        """Two steps ahead, as long as both may still be emitted."""
        if run.room() < 3:
            return None
        index = run.lengths[:, None] + torch.arange(2)
        right = self.truth.gather(1, index.clamp(max=self.truth.shape[1] - 1))
        wrong = other(right)
        return Draft(
            torch.stack((wrong[:, 0], right[:, 0], wrong[:, 1], right[:, 1]), dim=1), (-1, -1, 1, 1)
        )


def other(ids: Tensor) -> Tensor:
    """Another id for each."""
    return (ids + 1) % models.VOCABULARY


def knows(truth: Tensor) -> Oracle:
    """An oracle for this call."""
    Oracle.truth = truth
    return Oracle()


def made(text: str) -> Technique:
    """The one technique of a plan text."""
    return next(iter(Plan.parse(text)))
