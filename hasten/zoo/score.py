"""How well a model knows a text: bits per byte, beside what `xz` needs for the same text."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hasten.errors import HastenError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def bits_per_byte(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    context: int = 2048,
    stride: int | None = None,
    max_bytes: int | None = None,
) -> float:
    """Mean information of `texts` under `model`, in bits per byte of UTF-8; lower is better.

    Unlike loss per token it can be compared between tokenizers. Each text is read on its own
    after one end-of-text token.

    Args:
        stride: tokens scored per window after the first; each is then seen with at least
            `context - stride` tokens before it. None means half the context.
        max_bytes: every text is cut to an equal share of this, to save time.

    Raises:
        HastenError: where there is no text or the stride is not within the context.
    """
    stride = context // 2 if stride is None else stride
    if not 1 <= stride <= context:
        raise HastenError(f"stride is {stride}; give 1 to {context}, the context")
    if max_bytes is not None:
        texts = [text[: max_bytes // max(1, len(texts))] for text in texts]
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes == 0:
        raise HastenError("there is no text to score; give at least one text that is not empty")
    nats = sum(_nats(model, _ids(tokenizer, text), context, stride) for text in texts if text)
    return nats / math.log(2) / num_bytes


def xz_bits_per_byte(texts: Sequence[str]) -> float:
    """What `xz -9` needs for all `texts` as one stream, in bits per byte."""
    raw = "".join(texts).encode()
    return len(lzma.compress(raw, preset=9)) * 8 / len(raw)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([tokenizer.eos_token_id, *ids])


@torch.no_grad()
def _nats(model: nn.Module, ids: Tensor, context: int, stride: int) -> float:
    """Total cross-entropy of `ids[1:]`; `ids` is 1-D."""
    device = next(model.parameters()).device
    total, scored, num_targets = 0.0, 0, len(ids) - 1
    while scored < num_targets:
        end = min(num_targets, context if scored == 0 else scored + stride)
        start = max(0, end - context)
        window = ids[start : end + 1].to(device)
        logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
        fresh = end - scored  # the last ones of the window; those before are only context
        total += cross_entropy(logits[-fresh:], window[-fresh:], reduction="sum").item()
        scored = end
    return total
