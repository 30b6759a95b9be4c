"""What a runner takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from hasten.causal.cache import KVCache
    from hasten.causal.slots import KV


@dataclass
class Block:
    """The input of one pass.

    Attributes:
        tokens: (batch, block) ids; holes may hold any valid id.
        positions: (batch, block) true positions, -1 for a hole.
        tree: (block, block) bool, True where the row may see the column; None for a chain.
        num_logits: logits are wanted for this many last tokens of the block.
        has_holes: some position is -1.
        is_prompt: this is the prompt's pass.
    """

    tokens: Tensor
    positions: Tensor
    tree: Tensor | None = None
    num_logits: int = 1
    has_holes: bool = False
    is_prompt: bool = False


@dataclass
class Output:
    """The result of one pass.

    Attributes:
        logits: (batch, num_logits, vocabulary).
        hidden: (batch, num_logits, hidden_size) input of the LM head, or None if not asked for.
    """

    logits: Tensor
    hidden: Tensor | None = None

    def at(self, rows: Tensor) -> Output:
        """Output at one row per batch entry: `rows` (batch,) -> num_logits of 1."""
        index = rows[:, None, None]
        logits = self.logits.gather(1, index.expand(-1, 1, self.logits.shape[2]))
        hidden = self.hidden
        if hidden is not None:
            hidden = hidden.gather(1, index.expand(-1, 1, hidden.shape[2]))
        return Output(logits, hidden)


class Runner:
    """Runs passes of one model. The block stays open in the cache: commit or roll back after."""

    name: ClassVar[str]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)

    @property
    def device(self) -> torch.device:
        """Where tokens must be."""
        return self.model.device

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache with room for `capacity` entries (it grows when that is not enough)."""
        raise NotImplementedError

    def forward(
        self,
        block: Block,
        cache: KVCache,
        *,
        hidden: bool = False,
        kv: KV | None = None,
        kv_state: Any = None,
    ) -> Output:
        """Run one block; `kv` is the technique that watches or chooses what is read."""
        raise NotImplementedError
