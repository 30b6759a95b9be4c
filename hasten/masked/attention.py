"""Attention without a direction, put into a model for the time of a pass.

Transformers models look their attention up by name, so a decoder becomes a model that sees both
ways without a change to it: the function registered here ignores the causal mask that the model
would use, and reads what may be seen from the pass in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

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
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; shapes as transformers' attention functions, returns (out, None).

    query is (batch, heads, rows, head_dim); key and value (batch, kv_heads, length, head_dim).
    """
    special = {"softcap": softcap, "sinks": kwargs.get("s_aux"), "window": sliding_window}
    for name, found in special.items():
        if found is not None:
            raise SubjectError(
                f"{type(module).__name__} uses attention with a {name}, which the masked engine "
                "cannot run."
            )
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_VISIBLE.get(),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
