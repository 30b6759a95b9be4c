"""Attention without a direction, put into a model for the time of a pass.

Transformers models look their attention up by name, so a decoder becomes a model that sees both
ways without a change to it: the function registered here ignores the causal mask that the model
would use, and reads what may be seen from the pass in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from hasten.causal.attention import engine_attention
from hasten.errors import SubjectError

NAME = "hasten_masked"

_VISIBLE: ContextVar[Tensor | None] = ContextVar("hasten_visible", default=None)


@contextmanager
def undirected(model: PreTrainedModel, visible: Tensor | None = None) -> Iterator[None]:
    """Run a model so that all positions see each other; its own attention is back afterwards.

    Args:
        visible: bool, broadcast to (batch, heads, rows, length): True where a row may look. None
            hides nothing.
    """
    token = _VISIBLE.set(visible)
    try:
        with engine_attention(model, NAME):
            yield
    finally:
        _VISIBLE.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; shapes as transformers' attention functions, returns (out, None).

    query is (batch, heads, rows, head_dim); key and value (batch, kv_heads, length, head_dim).
    """
    check_plain(module, kwargs)
    if query.device.type == "cpu" and torch.is_grad_enabled() and query.requires_grad:
        out = _two_products(query, key, value, _VISIBLE.get(), scaling)
    else:
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_VISIBLE.get(),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return out.transpose(1, 2).contiguous(), None


def check_plain(module: nn.Module, further: Mapping[str, Any]) -> None:
    """Raise where a layer asks for attention of a kind that the engine lacks.

    Args:
        further: what it hands over beside query, key, value, mask, dropout and scale.
    """
    names = {"softcap": "softcap", "s_aux": "sinks", "sliding_window": "window"}
    for key, name in names.items():
        if further.get(key) is not None:
            raise SubjectError(
                f"{type(module).__name__} uses attention with a {name}, which the masked engine "
                "cannot run."
            )


def _two_products(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention as two matrix products, for learning on processors.

    The backward pass of the fused kernel for CPUs takes several times as long as this one's.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):  # it would do the softmax in float32
        query, key = query.to(value.dtype), key.to(value.dtype)  # rotary positions widen them
        # Queries that share keys become rows of one product.
        rows = (query * scale).unflatten(1, (-1, groups)).flatten(2, 3)
        scores = rows @ key.transpose(-1, -2)
        if visible is not None:
            bias = torch.zeros_like(visible, dtype=scores.dtype).masked_fill_(~visible, -torch.inf)
            scores = scores.unflatten(2, (groups, -1)) + bias[:, :, None]
            scores = scores.flatten(2, 3)
        out = scores.softmax(dim=-1) @ value
        return out.unflatten(2, (groups, -1)).flatten(1, 2)


AttentionInterface.register(NAME, attention)
