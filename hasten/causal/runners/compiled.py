"""Decoding passes through `torch.compile`: static buffers, a few fixed block widths.

Prompts run eagerly (their length differs from call to call, and they are bound by arithmetic).
A decoding pass is padded to one of a few widths; what the padding writes lies behind the entries in
use, is masked, and is overwritten by the next pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hasten.causal.attention import STATIC_NAME, engine_attention
from hasten.causal.cache import Handover, KVCache
from hasten.causal.runners.base import Block, Output
from hasten.causal.runners.eager import EagerRunner
from hasten.causal.slots import KV

CAPACITY_STEP = 256  # cache lengths are rounded up to this, so that few shapes are compiled
MAX_WIDTHS = 4  # block widths per model; a pass of yet another one runs eagerly
MAX_GRAPHS = 64  # widths times capacities, over all models of a process


class CompiledRunner(EagerRunner):
    """`torch.compile` around the model's forward pass, one graph per block width and capacity.

    The first pass of each width compiles, which takes seconds to a minute. Ids agree with the eager
    runner's; logits differ in the last bits, because fused kernels round differently.
    """

    name = "compiled"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._widths: list[int] = []
        self._head = _CaughtInput(model)
        self._pass = torch.compile(self._static_pass, dynamic=False)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """A cache whose capacity is a round number."""
        return super().new_cache(batch, _rounded(capacity))

    @torch.no_grad()
    def forward(
        self,
        block: Block,
        cache: KVCache,
        *,
        hidden: bool = False,
        kv: KV | None = None,
        kv_state: Any = None,
    ) -> Output:
        """See `Runner.forward`."""
        length = cache.get_seq_length()
        width = self._width(block.tokens.shape[1])
        if block.is_prompt or length == 0 or width is None or self._is_windowed(length + width):
            return super().forward(block, cache, hidden=hidden, kv=kv, kv_state=kv_state)
        assert kv is None, "a technique of the slot kv does not run on the compiled runner"
        return self._forward_static(block, cache, length, width, hidden)

    def _width(self, wanted: int) -> int | None:
        """The compiled width for a block, or None where it is better run eagerly."""
        fitting = [width for width in self._widths if wanted <= width <= 2 * wanted]
        if fitting:
            return min(fitting)
        if len(self._widths) == MAX_WIDTHS:
            return None
        self._widths.append(wanted)
        return wanted

    def _is_windowed(self, length: int) -> bool:
        """Whether a sliding window is in force at this length (the static mask knows none)."""
        window = getattr(self.config, "sliding_window", None)
        return window is not None and length > window

    def _forward_static(
        self, block: Block, cache: KVCache, length: int, width: int, hidden: bool
    ) -> Output:
        real = block.tokens.shape[1]
        capacity = _rounded(max(length + width, cache.layers[0].capacity))
        for layer in cache.layers:
            layer.reserve(capacity)
        capacity = cache.layers[0].buffers[0].shape[2]
        cache.open_block(block.positions, has_holes=block.has_holes)
        slots = torch.arange(length, length + width, device=self.device)
        mask = _static_mask(cache, block, slots, capacity)
        tokens = _padded(block.tokens, cache.batch, width)
        positions = _padded(block.positions.clamp(min=0), cache.batch, width)
        view = _StaticView([layer.buffers for layer in cache.layers], slots)
        limits = torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS)
        with engine_attention(self.model, STATIC_NAME), self._head, limits:
            logits = self._pass(tokens, positions, mask, view)
        for layer in cache.layers:
            layer.length = length + real
        rows = slice(real - block.num_logits, real)
        caught = self._head.value
        return Output(logits[:, rows], caught[:, rows] if hidden and caught is not None else None)

    def _static_pass(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, view: _StaticView
    ) -> Tensor:
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=view,
            use_cache=True,
        ).logits


class _StaticView(Handover):
    """The buffers of a cache as a compiled pass sees them: whole, written at given slots."""

    def __init__(self, buffers: list[tuple[Tensor, Tensor]], slots: Tensor) -> None:
        super().__init__()
        self.buffers = buffers
        self.slots = slots

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a block at the slots; return the whole buffers."""
        for buffer, new in zip(self.buffers[layer], (keys, values), strict=True):
            buffer.index_copy_(2, self.slots, new)
        return self.buffers[layer]


class _CaughtInput:
    """Catches what enters the LM head, in compiled code too (the hook stays on during passes)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._module: nn.Module = model.get_output_embeddings()
        self._handle: Any = None
        self.value: Tensor | None = None

    def __enter__(self) -> None:
        self.value = None
        self._handle = self._module.register_forward_pre_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.value = inputs[0]

    def __exit__(self, *exc: object) -> None:
        self._handle.remove()


def _rounded(capacity: int) -> int:
    return -(-capacity // CAPACITY_STEP) * CAPACITY_STEP


def _padded(tensor: Tensor, batch: int, width: int) -> Tensor:
    """A fresh (batch, width) copy of (batch or 1, block), its last column repeated.

    Fresh, because a compiled graph is tied to strides as well as to shapes.
    """
    out = tensor.new_empty((batch, width))
    out[:, : tensor.shape[1]] = tensor
    out[:, tensor.shape[1] :] = tensor[:, -1:]
    return out


def _static_mask(cache: KVCache, block: Block, slots: Tensor, capacity: int) -> Tensor:
    """Bool mask (batch or 1, 1, width, capacity): causal by slot, minus holes, times the tree."""
    columns = torch.arange(capacity, device=slots.device)
    mask = (columns <= slots[:, None])[None, None]
    (table,) = cache.tables()
    if table.has_holes:
        seen = table.positions >= 0  # (batch, 1, length)
        behind = seen.new_ones((*seen.shape[:2], capacity - seen.shape[2]))
        mask = mask & torch.cat((seen, behind), dim=2)[:, :, None, :]
        mask = mask | (columns == slots[:, None])  # a hole sees itself, or its row becomes NaN
    if block.tree is not None:
        real = block.tree.shape[0]
        start = int(slots[0])
        mask = mask.clone()
        mask[:, :, :real, start : start + real] &= block.tree
    return mask
