"""Quality of text on plain arrays and strings; no engine, no tokenizer.

Everything here is measured per unit (file, prompt, position), so that two models can be compared
pair by pair with `hasten.measure.stats`. What concerns Python source stands in two files of its
own and is offered here as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.measure.parsing import parse_share, parses
from hasten.measure.retrieval import RetrievalItem, retrieval_items, retrieved

__all__ = [
    "Agreement",
    "RetrievalItem",
    "agreement",
    "bits_per_byte",
    "kl_divergence",
    "parse_share",
    "parses",
    "perplexity",
    "retrieval_items",
    "retrieved",
]


def bits_per_byte(nll_nats_sum: float, num_bytes: int) -> float:
    """Bits that the model needs per byte of UTF-8 text, from the summed negative log-likelihood."""
    if num_bytes < 1:
        raise ValueError(f"at least one byte is needed, not {num_bytes}")
    return nll_nats_sum / math.log(2) / num_bytes


def perplexity(nlls: Iterable[float] | Tensor) -> float:
    """exp of the mean negative log-likelihood (nats) over tokens; infinite where that overflows."""
    values = torch.as_tensor(nlls if isinstance(nlls, Tensor) else list(nlls), dtype=torch.float64)
    if values.numel() == 0:
        raise ValueError("at least one token is needed")
    return float(values.mean().exp())


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) in nats per position: (..., vocabulary) twice -> (...).

    p is the original, q the candidate. Infinite where q forbids what p allows; a logit of minus
    infinity in p counts as probability zero. Computed in float64, as the difference of two nearly
    equal distributions vanishes in less.
    """
    if logits_p.shape != logits_q.shape:
        raise ValueError(f"shapes differ: {tuple(logits_p.shape)} and {tuple(logits_q.shape)}")
    log_p = torch.log_softmax(logits_p.double(), dim=-1)
    log_q = torch.log_softmax(logits_q.double(), dim=-1)
    terms = log_p.exp() * (log_p - log_q)
    # 0 * log(0 / q) is 0 by convention; in floating point it is NaN.
    return torch.where(log_p.isneginf(), 0.0, terms).sum(dim=-1).clamp(min=0.0)


@dataclass(frozen=True)
class Agreement:
    """How two id sequences compare. A prefix of a longer sequence is not identical to it.

    `share` is the number of places with equal ids over the longer length; `first_divergence` the
    first place where they differ, which for a prefix is its length; None if identical.
    """

    share: float
    first_divergence: int | None
    length_a: int
    length_b: int

    @property
    def identical(self) -> bool:
        """Same ids and same length."""
        return self.first_divergence is None


def agreement(ids_a: Sequence[int] | Tensor, ids_b: Sequence[int] | Tensor) -> Agreement:
    """Compare two sequences of ids, shape (length,) each, place by place and with their lengths."""
    a, b = _ids(ids_a), _ids(ids_b)
    same = [x == y for x, y in zip(a, b, strict=False)]
    longer = max(len(a), len(b))
    first = same.index(False) if False in same else len(same)
    return Agreement(
        share=sum(same) / longer if longer else 1.0,
        first_divergence=None if first == longer else first,
        length_a=len(a),
        length_b=len(b),
    )


def _ids(ids: Sequence[int] | Tensor) -> list[int]:
    values = ids.tolist() if isinstance(ids, Tensor) else [int(i) for i in ids]
    if values and isinstance(values[0], list):
        raise ValueError("one sequence is needed, not a batch; compare row by row")
    return values
