"""What a model that fills masks writes, by how many places it fills in each pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_A_PASS = (1, 2, 4, 8)
NEW = 64  # tokens written after each passage


@torch.no_grad()
def quality_by_tokens_a_pass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    passages: Tensor,
    *,
    counts: Sequence[int] = TOKENS_A_PASS,
) -> dict[str, float]:
    """How likely the continuations are to the autoregressive model that it was made from.

    Args:
        passages: (rows, length) ids that are continued.
        counts: places filled in each pass, the surest first.

    Returns:
        "nll_at_1" and so on, nats per token of the base; "nll_of_base" for what the base itself
        writes greedily.
    """
    # The engines stand on the zoo; a recipe only looks at what it has made through one of them.
    import hasten

    length = passages.shape[1]
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1}
    found = {}
    ids: Any
    for count in counts:
        plan = f"fixed_steps(tokens_per_pass={count})"
        with hasten.apply(model, plan, tokenizer=tokenizer) as fast:
            ids = fast.generate(passages, **settings)
        found[f"nll_at_{count}"] = _nats(base, ids, length)
    with hasten.apply(base, tokenizer=tokenizer) as plain:
        ids = plain.generate(passages, **settings)
    return found | {"nll_of_base": _nats(base, ids, length)}


def _nats(base: PreTrainedModel, ids: Tensor, length: int) -> float:
    """Mean negative log-likelihood of what stands behind the first `length` ids."""
    logits = base(ids).logits[:, length - 1 : -1].float()
    chances = logits.log_softmax(dim=-1).gather(2, ids[:, length:, None])
    return -float(chances.mean())
