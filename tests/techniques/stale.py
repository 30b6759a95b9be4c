"""Kept keys and values, written by hand: what a pass says that computes only some positions.

The whole text goes through the model, and in every layer the keys and values of all positions that
the pass does not compute are put back to what they were when it last did. What the computed
positions say is then what a pass over them alone must say, without any arithmetic on positions.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from hasten.causal.attention import engine_attention
from tests.techniques.fillers import MASK

NAME = "tests_stale"


class Stale:
    """A model that fills masks, and the keys and values of one text as they were last computed."""

    def __init__(self, model: PreTrainedModel, pads: Tensor | None = None) -> None:
        self.model = model
        self.pads = pads
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.rows: Tensor | None = None
        self.visible: Tensor | None = None

    @torch.no_grad()
    def logits(
        self,
        tokens: Tensor,
        rows: Collection[int] | None = None,
        embeddings: Tensor | None = None,
    ) -> Tensor:
        """What is said of every place, (batch, length, vocabulary); right where `rows` speak of it.

        Args:
            rows: positions that are computed; None for all.
            embeddings: (batch, length, hidden) to be read instead of the tokens' own.
        """
        length = tokens.shape[1]
        places = torch.arange(length)
        pads = torch.zeros(tokens.shape[0], dtype=torch.long) if self.pads is None else self.pads
        self.rows = None if rows is None else torch.isin(places, torch.tensor(sorted(rows)))
        seen = (places >= pads[:, None])[:, None] | torch.eye(length, dtype=torch.bool)
        block = getattr(self.model.config, "block_length", None)
        if block:
            number = (places - pads[:, None]).div(block, rounding_mode="floor")
            seen = seen & (number[:, :, None] >= number[:, None])
        self.visible = seen[:, None]
        read = {"input_ids": tokens} if embeddings is None else {"inputs_embeds": embeddings}
        global _CURRENT
        _CURRENT = self
        with engine_attention(self.model, NAME):
            logits = self.model(
                **read, position_ids=(places - pads[:, None]).clamp(min=0), use_cache=False
            ).logits.float()
        if self.model.config.shifted_logits:  # nobody stands before a row's first token
            source = torch.where(places <= pads[:, None], places, places - 1)
            logits = logits.gather(1, source[:, :, None].expand_as(logits))
        logits[..., MASK] = -torch.inf
        return logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(batch, length, heads, head_dim)."""
        if self.rows is not None:
            new = self.rows[:, None]
            before = self.kept[layer]
            key, value = torch.where(new, key, before[0]), torch.where(new, value, before[1])
        self.kept[layer] = key, value
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        scores = (query @ key.transpose(2, 3)) * scale
        assert self.visible is not None
        return (scores.masked_fill(~self.visible, -torch.inf).softmax(-1) @ value).transpose(1, 2)


_CURRENT: Stale | None = None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    assert _CURRENT is not None
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return _CURRENT.attend(module.layer_idx, query, key, value, scale).contiguous(), None


AttentionInterface.register(NAME, _attention)
