"""The model as it is: the reference for every proof."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.masked.attention import undirected
from hasten.masked.runners.base import Look, Runner, Said


class EagerRunner(Runner):
    """Calls the transformers model directly, on the engine's attention."""

    name: ClassVar[str] = "eager"
    capacity_step: ClassVar[int] = 1

    @torch.no_grad()
    def read(self, look: Look) -> Said:
        """See `Runner.read`."""
        if look.cache is not None and look.cache.is_empty:
            config = self.model.config.get_text_config(decoder=True)
            look.cache.expect_model(config.num_hidden_layers, self.capacity_step)
        read: dict[str, Any] = {"input_ids": look.tokens}
        if look.embeddings is not None:
            read = {"inputs_embeds": look.embeddings}
        with undirected(self.model, look.visible):
            logits: Tensor = self.model(
                **read,
                position_ids=look.positions,
                past_key_values=look.cache,
                use_cache=look.cache is not None,
                logits_to_keep=look.kept,
            ).logits
        return Said.of(logits, look.mask_id)
