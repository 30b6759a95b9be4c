"""Double Sparsity: a few channels of every key find the few entries worth reading."""

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
from hasten.causal.runners import Block, EagerRunner
from hasten.causal.slots import KV
from hasten.preparation import Preparation
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Parts,
    Phase,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)

CALIBRATION_LENGTH = 256  # tokens per sample; the paper takes 512
CALIBRATION_BATCH = 4
CALIBRATION_STEPS = 16  # the paper takes 256 samples, this makes 64 of them


class Labels:
    """The label cache of one layer: some channels of every key, in the order of the cache.

    Quantised labels are packed into bytes, each entry with its own smallest value and step.
    """

    def __init__(self, channels: Tensor, bits: int) -> None:
        self.channels = channels  # (kv_heads, r)
        self.bits = bits  # 16 leaves the values as they are in the cache
        self.length = 0  # entries whose labels are final
        self.buffers: list[Tensor] = []  # values; or bytes, smallest value and step

    def update(self, layer: LayerCache, block: int, *, final: bool) -> None:
        """Follow the cache, whose last `block` entries belong to the pass in flight.

        These may still be moved or dropped unless `final`, so the next update takes them again.
        """
        start = min(self.length, layer.length - block)
        keys = layer.keys[:, :, start:]
        index = self.channels[None, :, None, :].expand(*keys.shape[:3], -1)
        fresh = self._packed(keys.gather(3, index))
        capacity = layer.buffers[0].shape[2]
        if not self.buffers or self.buffers[0].shape[2] < capacity:
            self.buffers = [self._wider(i, part, start, capacity) for i, part in enumerate(fresh)]
        for buffer, part in zip(self.buffers, fresh, strict=True):
            buffer[:, :, start : layer.length] = part
        self.length = layer.length if final else layer.length - block

    def values(self, length: int) -> Tensor:
        """The first `length` labels, (batch, kv_heads, length, r)."""
        parts = [buffer[:, :, :length] for buffer in self.buffers]
        if self.bits == 16:
            return parts[0]
        codes, low, step = parts
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=codes.device)
        unpacked = (codes[..., None] >> shifts) & (2**self.bits - 1)
        return unpacked.flatten(3)[..., : self.channels.shape[1]].to(low.dtype) * step + low

    def scores(self, query: Tensor, length: int) -> Tensor:
        """Approximate products of queries (batch, heads, block, head_dim) with the first entries.

        Returns (batch, heads, block, length), not scaled.
        """
        batch, heads, block, dim = query.shape
        kv_heads = self.channels.shape[0]
        grouped = query.reshape(batch, kv_heads, -1, dim)  # query heads of one KV head are adjacent
        index = self.channels[None, :, None, :].expand(*grouped.shape[:3], -1)
        products = grouped.gather(3, index) @ self.values(length).transpose(2, 3)
        return products.view(batch, heads, block, length)

    def num_bytes(self) -> int:
        """Bytes of the buffers, unused part included."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def _packed(self, labels: Tensor) -> list[Tensor]:
        """Labels (..., r) as they are stored: min-max quantised per entry, first code lowest."""
        if self.bits == 16:
            return [labels]
        levels = 2**self.bits - 1
        low, high = labels.aminmax(dim=-1, keepdim=True)
        step = (high - low) / levels
        codes = ((labels - low) / step.clamp(min=1e-30)).round().clamp(0, levels).to(torch.uint8)
        per_byte = 8 // self.bits
        codes = nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte))
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=codes.device)
        packed = (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(dim=-1, dtype=torch.uint8)
        return [packed, low, step]

    def _wider(self, i: int, part: Tensor, used: int, capacity: int) -> Tensor:
        wider = part.new_zeros((*part.shape[:2], capacity, part.shape[3]))
        if self.buffers:
            wider[:, :, :used] = self.buffers[i][:, :, :used]
        return wider


@dataclass
class State:
    """One call. A forked cache has new layers, whose labels are made again from its keys."""

    channels: list[Tensor]
    labels: WeakKeyDictionary[LayerCache, Labels] = field(default_factory=WeakKeyDictionary)
    reads: Reads = field(default_factory=Reads)
    label_bytes: int = 0


@technique("double_sparsity")
@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(KV):
    """Scores all entries on a few channels and reads the best of them in full.

    `prepare` finds, per layer and KV head, the channels that carry most of the product of queries
    and keys on ordinary text. A label cache holds these channels of every key. Each decoding pass
    takes the products on them, and attends exactly to the entries with the highest ones. The
    prompt is read in full.

    Source: Double Sparsity (arXiv 2408.07092) and its released code. As released, each query head
    selects for itself. Different from it: the statistic is taken on rotated queries and keys for
    all three choices (labels hold rotated keys, and rotation mixes channels), is accumulated over
    the whole calibration text, and is averaged over the query heads that share a KV head, so that
    there is one label per key. Extensions of ours: `sinks` and `pooled`. Of the paper, offloading
    is left out.
    """

    card: ClassVar[Card] = Card(
        title="Post-Training Sparse Attention with Double Sparsity",
        family="kv_cache",
        loss=Loss.LOSSY,
        paper="double_sparsity",
        link="https://arxiv.org/abs/2408.07092",
        year=2024,
        claims=(
            Claim("speed-up of the attention operator, at most", 14.1, "1/16 of tokens, on a GPU"),
            Claim("speed-up end to end", 1.9, "Llama-2-7B class models, on a GPU"),
            Claim("decoding speed-up with offloading", 16.3, "256K tokens of context, on a GPU"),
        ),
        neutral={"budget": 1.0},
        rival=Rival(
            "random_eviction(budget={budget})",
            "perplexity",
            "reads as many entries, chosen without looking at them",
        ),
        saves="cache_bytes",
        trained=True,
        notes=(
            "Saves reading, not memory: the cache stays whole and the labels come on top "
            "(activity: label_bytes). The paper reads 1/16 of the entries on 1/16 of 128 channels; "
            "that is 8 channels, a quarter of the small heads for which the default is made. "
            "Selection per query head reads an entry once for each head that wants it; "
            "pooled=true reads it once per KV head. Choosing costs time too: on a CPU with contexts of "
            "a few thousand tokens it costs more than it saves. Offloading, behind the largest claim, is not "
            "part of this."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.KV,),
        reads=frozenset({Resource.STEP_ATTENTION}),
        changes=frozenset({Resource.KV_READS}),
        # The channels belong to one model: another one's passes cannot use them.
        needs=frozenset({Resource.KV_ENTRIES, Resource.MODEL_CHOICE}),
        phase=Phase.PASS,
    )
    part_knobs: ClassVar[tuple[str, ...]] = ("statistic",)

    budget: float = knob(
        0.125, "share of the cache that a pass reads; less is faster and drifts more",
        low=0.0, high=1.0,
    )  # fmt: skip
    channels: float = knob(
        0.25, "share of a head's channels that the labels hold; fewer find worse entries",
        low=0.0, high=1.0,
    )  # fmt: skip
    statistic: str = knob(
        "qk", "what ranks the channels: mean size of the product, the query or the key",
        choices=("qk", "q", "k"),
    )  # fmt: skip
    label_bits: int = knob(
        16, "bits of a label's value; 16 keeps the model's own precision", choices=(16, 4, 1)
    )
    sinks: int = knob(0, "first tokens that are always read (not in the paper)", low=0)
    pooled: bool = knob(
        False, "query heads that share a KV head read the same entries (not in the paper)"
    )

    def prepare(self, preparation: Preparation) -> Parts:
        """Channels of each KV head in falling order of the statistic: one (kv_heads, head_dim) a layer."""
        runner = EagerRunner(preparation.subject.model)
        steps = preparation.steps or CALIBRATION_STEPS
        length = min(CALIBRATION_LENGTH, preparation.subject.context or CALIBRATION_LENGTH)
        watcher = _Watcher()
        sums: dict[int, Tensor] = {}
        batches = preparation.batches(length=length, batch=CALIBRATION_BATCH, steps=steps)
        for done, ids in enumerate(batches, start=1):
            positions = torch.arange(length, device=ids.device).expand_as(ids)
            cache = runner.new_cache(len(ids), length)
            block = Block(ids, positions, is_prompt=True)
            runner.forward(block, cache, kv=watcher, kv_state=(self.statistic, sums))
            preparation.tick(done, steps, f"{self.name}: channel statistics")
        return {
            f"layers.{i}.channels": total.argsort(dim=-1, descending=True, stable=True).int().cpu()
            for i, total in sums.items()
        }

    def bind(self, model: nn.Module, parts: Parts) -> list[Tensor]:
        """The label channels of each layer, (kv_heads, r)."""
        device = next(model.parameters()).device
        orders = [parts[f"layers.{i}.channels"] for i in range(len(parts))]
        return [
            order[:, : max(1, round(self.channels * order.shape[1]))].long().to(device)
            for order in orders
        ]

    def begin(self, run: Run, bound: Any) -> State:
        """No labels yet."""
        return State(bound)

    def read(self, state: State, view: AttentionView) -> Tensor | None:
        """The entries with the best labels, per query head (or KV head) and query."""
        if self.budget == 1.0:
            return None
        layer, block = view.layer, view.query.shape[2]
        if layer not in state.labels:
            state.labels[layer] = Labels(state.channels[view.layer_idx], self.label_bits)
        labels = state.labels[layer]
        labels.update(layer, block, final=view.is_prompt)
        if view.is_prompt:
            return None
        chosen = self._choose(labels.scores(view.query, layer.length), view)
        state.reads.add(view, chosen)
        return chosen

    def finish(self, state: State, run: Run) -> None:
        """Report the reads, and the bytes of the label cache at the call's end."""
        if state.reads.report(run, self.name):
            run.activity[f"{self.name}.label_bytes"] = sum(
                labels.num_bytes() for labels in state.labels.values()
            )

    def _choose(self, scores: Tensor, view: AttentionView) -> Tensor | None:
        """The best entries by `scores` (batch, heads, block, length)."""
        seen = visible(view)
        if self.pooled and view.groups > 1:
            scaled = scores.float() * view.scaling
            if seen is not None:
                scaled = scaled.masked_fill(~seen, float("-inf"))
            scores = scaled.softmax(dim=-1).unflatten(1, (-1, view.groups)).amax(dim=2)
        if self.sinks:
            positions = view.layer.positions[:, :, None, :]
            is_sink = (positions >= 0) & (positions < self.sinks)
            scores = scores.masked_fill(is_sink, float("inf"))
        if scores.shape[2] == 1:
            scores, seen = scores[:, :, 0], None if seen is None else seen[:, :, 0]
        return top_entries(scores, seen, self.budget)


class _Watcher(KV):
    """Sums a statistic of the channels over the tokens of a prompt, by layer."""

    def observe(self, state: tuple[str, dict[int, Tensor]], view: AttentionView) -> None:
        """Add |query * key|, |query| or |key| of each position: (kv_heads, head_dim)."""
        statistic, sums = state
        keys = view.layer.keys.float().abs()
        queries = view.query.float().abs().unflatten(1, (-1, view.groups)).mean(dim=2)
        size = {"qk": queries * keys, "q": queries, "k": keys}[statistic].sum(dim=(0, 2))
        sums[view.layer_idx] = sums.get(view.layer_idx, 0) + size
