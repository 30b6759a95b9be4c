"""Made-up attention calls and a plain dense reference, for the tests of attention techniques."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hasten.denoise.attention.sparse import Cells, Reads, attend
from hasten.denoise.blocks import AttentionCall

CPU = torch.device("cpu")


def attention_call(
    tokens: int,
    *,
    before: int = 0,
    behind: int = 0,
    batch: int = 2,
    heads: int = 4,
    key_heads: int | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
    sharp: float = 1.0,
    **more: Any,
) -> AttentionCall:
    """A random call over text, sample and text again."""
    generator = torch.Generator().manual_seed(seed)
    length, dim = before + tokens + behind, 8

    def draw(count: int) -> Tensor:
        return torch.randn(batch, count, length, dim, generator=generator)

    keys = key_heads or heads
    given = {"query": draw(heads) * sharp, "key": draw(keys), "value": draw(keys), **more}
    return AttentionCall(0, 0, given | ({} if mask is None else {"attn_mask": mask}))


def masked_dense(call: AttentionCall, seen: Tensor) -> Tensor:
    """Attention by its definition, with what is not seen left out of the softmax.

    Args:
        seen: (..., length, length) bool.
    """
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1).double() for t in (call.key, call.value))
    scale = call.arguments.get("scale") or call.query.shape[-1] ** -0.5
    scores = call.query.double() @ key.transpose(-1, -2) * scale
    mask = call.mask
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    scores = scores.masked_fill(~seen, -torch.inf)
    return (scores.softmax(dim=-1) @ value).to(call.query.dtype)


def seen_tokens(cells: Cells, seen: Tensor, *, before: int = 0, behind: int = 0) -> Tensor:
    """(..., length, length) which tokens are seen, from (..., cells, cells); the text always is."""
    cell = cells.inverse // cells.size
    tokens, length = len(cell), before + len(cell) + behind
    found = torch.ones(*seen.shape[:-2], length, length, dtype=torch.bool)
    found[..., before : before + tokens, before : before + tokens] = seen[..., cell, :][..., cell]
    return found


def run_attention(
    call: AttentionCall, cells: Cells, reads: list[Reads], *, before: int = 0
) -> tuple[Tensor, Counter[str]]:
    """The sparse attention, and what it counted."""
    run: Any = SimpleNamespace(activity=Counter())
    return attend(run, "x", call, cells, before, reads), run.activity
