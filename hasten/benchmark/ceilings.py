"""Which ceiling a plan has on a subject: what it can save at most, and of which share of the time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.measure.ceilings import Ceiling, Term, TokenWork, amdahl, ceiling, modelled_shares
from hasten.measure.limits import Limits
from hasten.plan import Plan
from hasten.subject import Subject
from hasten.technique import Technique

if TYPE_CHECKING:
    from hasten.denoise.shares import Shares

DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "bf16"}


@dataclass(frozen=True)
class BaselineTimes:
    """How the baseline's time divides: seconds a call, and those of its prompt (measured)."""

    call_seconds: float
    prefill_seconds: float
    tokens: float

    @property
    def decode_share(self) -> float:
        """Share of the call spent after the prompt."""
        return max(0.0, min(1.0, 1.0 - self.prefill_seconds / self.call_seconds))

    @property
    def decode_seconds_per_token(self) -> float:
        """Seconds of one decoding step."""
        return max(1e-9, (self.call_seconds - self.prefill_seconds) / max(1.0, self.tokens - 1))


def token_work(subject: Subject, mean_length: float) -> TokenWork:
    """Bytes and operations of one decoded token at a mean context length (tokens)."""
    config = subject.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    item = subject.model.dtype.itemsize
    cache = 2 * config.num_hidden_layers * heads * head_dim * item * mean_length
    head: Any = subject.model.get_output_embeddings()
    embedding: Any = subject.model.get_input_embeddings()
    weights = float(subject.num_bytes)
    if head is not None and head.weight is not embedding.weight:
        weights -= embedding.weight.nbytes  # one row of it is read, not all
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * mean_length
    return TokenWork(weights, cache, 2 * weights / item + attention)


def most_per_pass(technique: Technique) -> float:
    """The most tokens that one pass can yield under a technique that saves passes."""
    for knob in ("num_heads", "num_draft"):
        if knob in technique.knobs:
            return 1.0 + float(technique.knobs[knob])
    return math.inf


def saving(technique: Technique, subject: Subject) -> float:
    """How many times cheaper the term of a technique can get at most."""
    knobs = technique.knobs
    if technique.card.saves == "passes":
        return most_per_pass(technique)
    if technique.card.saves == "cache_bytes" and "budget" in knobs:
        return 1.0 / float(knobs["budget"])
    return math.inf


def plan_ceiling(
    plan: Plan, subject: Subject, times: BaselineTimes, work: TokenWork, limits: Limits
) -> Ceiling:
    """The ceiling of a whole plan: what its techniques save adds up, term by term."""
    shares = modelled_shares(
        work,
        limits,
        decode_seconds_per_token=times.decode_seconds_per_token,
        decode_share=times.decode_share,
    )
    savers = [t for t in plan if t.card.saves not in ("", "none")]
    if not savers:
        return ceiling("none", 0.0, 1.0, label="modelled", why="saves no time by itself")
    if len(savers) == 1:
        term = savers[0].card.saves
        return ceiling(term, shares[term], saving(savers[0], subject), label="modelled")  # type: ignore[arg-type,index]
    value, words = 1.0, []
    for technique in savers:
        term = technique.card.saves
        value *= amdahl(shares[term], saving(technique, subject))  # type: ignore[index]
        words.append(f"{technique.name}: {term.replace('_', ' ')}")
    detail = f"product of the single ceilings ({', '.join(words)})"
    return Ceiling(value, savers[0].card.saves, shares[savers[0].card.saves], "modelled", detail)  # type: ignore[arg-type,index]


def pipeline_ceiling(plan: Plan, shares: Shares) -> Ceiling:
    """The ceiling of a plan on a pipeline: what it saves, term by term, of measured shares."""
    savers = [t for t in plan if t.card.saves not in ("", "none")]
    if not savers:
        return ceiling("none", 0.0, 1.0, label="measured", why="saves no time by itself")
    terms: list[Term] = [technique.card.saves for technique in savers]  # type: ignore[misc]
    tops = [
        ceiling(term, shares.of(term), _most(technique, shares), label="measured")
        for technique, term in zip(savers, terms, strict=True)
    ]
    if len(tops) == 1:
        return tops[0]
    value = math.prod(top.value for top in tops)
    words = ", ".join(f"{t.name}: {term}" for t, term in zip(savers, terms, strict=True))
    detail = f"product of the single ceilings ({words})"
    return Ceiling(value, terms[0], tops[0].share, "measured", detail)


def _most(technique: Technique, shares: Shares) -> float:
    """How many times cheaper the term of a technique can get at its knobs; infinite if it may vanish."""
    most = getattr(technique, "most", None)
    return float(most(shares)) if callable(most) else math.inf
