"""The model as it is: the reference for every proof."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hasten.causal.attention import Pass, engine_attention, in_flight
from hasten.causal.cache import KVCache
from hasten.causal.runners.base import Block, Output, Runner
from hasten.causal.slots import KV


class EagerRunner(Runner):
    """Calls the transformers model directly, on the engine's cache and attention."""

    name = "eager"

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache; buffers are made at the first pass, in the model's own shapes."""
        return KVCache(self.config.num_hidden_layers, batch, capacity, self.device)

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
        cache.open_block(block.positions, has_holes=block.has_holes)
        current = Pass(cache, block.positions, block.tree, kv, kv_state, block.is_prompt)
        positions = block.positions.clamp(min=0) if block.has_holes else block.positions
        with (
            engine_attention(self.model),
            in_flight(current),
            _HeadInput(self.model, hidden) as head,
        ):
            logits = self.model(
                input_ids=block.tokens,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=block.num_logits,
            ).logits
        return Output(logits, head.value)


class _HeadInput:
    """Catches what goes into the LM head: the last hidden state after the final norm."""

    def __init__(self, model: nn.Module, wanted: bool) -> None:
        self._head = model.get_output_embeddings() if wanted else None  # type: ignore[operator]
        self._handle: Any = None
        self.value: Tensor | None = None

    def __enter__(self) -> _HeadInput:
        if self._head is not None:
            self._handle = self._head.register_forward_pre_hook(self._catch)
        return self

    def _catch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.value = inputs[0]

    def __exit__(self, *exc: object) -> None:
        if self._handle is not None:
            self._handle.remove()
