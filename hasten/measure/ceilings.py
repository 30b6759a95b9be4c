"""The most that a technique can gain here, said before it runs.

Pure arithmetic on bytes, operations, measured times and the machine's limits. A ceiling is Amdahl's
law: of the whole time, the technique can touch a share, and can make that share at most so many
times cheaper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from hasten.measure.limits import Limits

Term = Literal[
    "passes",
    "weight_bytes",
    "cache_bytes",
    "prefill",
    "calls",
    "guidance",
    "blocks",
    "attention",
    "tokens",
    "none",
]
Label = Literal["modelled", "measured"]

_WORDS: dict[Term, str] = {
    "passes": "forward passes of decoding",
    "weight_bytes": "reading weights",
    "cache_bytes": "reading the KV cache",
    "prefill": "the prompt",
    "calls": "calls of the network",
    "guidance": "the unconditional branch of the guidance",
    "blocks": "transformer blocks",
    "attention": "attention among the sample's tokens",
    "tokens": "the network's work on tokens",
    "none": "nothing",
}

_PLURAL: tuple[Term, ...] = ("passes", "calls", "blocks")


@dataclass(frozen=True)
class TokenWork:
    """What one decoded token costs in a plain pass: bytes read, operations, small calls."""

    weight_bytes: float
    cache_bytes: float = 0.0
    flops: float = 0.0
    calls: int = 0

    @property
    def total_bytes(self) -> float:
        """Weights and cache together."""
        return self.weight_bytes + self.cache_bytes


@dataclass(frozen=True)
class Floor:
    """Modelled least time of one token, in seconds, and what sets it."""

    seconds: float
    memory_seconds: float
    compute_seconds: float
    dispatch_seconds: float
    bound_by: Literal["memory", "compute", "dispatch"]


@dataclass(frozen=True)
class Ceiling:
    """The most a technique can gain, as a speed ratio (2.0: twice as fast at best).

    `term` is what the technique saves, `share` the share of the whole time which that term is, and
    `label` says whether the share was measured or modelled. `value` is infinite where the term is
    all of the time and can vanish.
    """

    value: float
    term: Term
    share: float
    label: Label
    detail: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON (an infinite value becomes None)."""
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "term": self.term,
            "share": self.share,
            "label": self.label,
            "detail": self.detail,
        }


def seconds_per_token(work: TokenWork, limits: Limits, *, dtype: str = "fp32") -> Floor:
    """Least time of one token on this machine (modelled).

    Reading and arithmetic can overlap, so the larger of the two counts; a working set that fits in
    a cache is read at the cache's rate. The dispatch of small calls runs beside them on a GPU and
    before them on a CPU, so it too is only compared: the floor holds for both.
    """
    memory = work.total_bytes / limits.bandwidth_for(work.total_bytes) if work.total_bytes else 0.0
    rate = limits.matrix_rate.get(dtype)
    compute = work.flops / rate if rate else 0.0
    dispatch = work.calls * limits.dispatch_seconds
    seconds = max(memory, compute, dispatch)
    if seconds == memory:
        return Floor(seconds, memory, compute, dispatch, "memory")
    return Floor(
        seconds, memory, compute, dispatch, "compute" if seconds == compute else "dispatch"
    )


def amdahl(share: float, factor: float) -> float:
    """Speed ratio when `share` of the time becomes `factor` times faster (infinite: vanishes).

    A factor below 1 is a slow-down. Raises ValueError for a share outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"a share of time lies between 0 and 1, not {share}")
    if not factor > 0.0:
        raise ValueError(f"a factor must be positive, not {factor}")
    rest = (1.0 - share) + share / factor
    return 1.0 / rest if rest > 0.0 else math.inf


def ceiling(
    term: Term,
    share: float,
    factor: float,
    *,
    label: Label,
    limit: float | None = None,
    why: str = "",
) -> Ceiling:
    """A technique that makes `term`, a `share` of the time, at most `factor` times cheaper.

    `limit` caps the value from elsewhere (a floor that no technique can break). `why` is added to
    the sentence.
    """
    value = 1.0 if term == "none" else amdahl(share, factor)
    if limit is not None:
        value = min(value, max(limit, 1.0))
    return Ceiling(value, term, share, label, _sentence(term, share, factor, value, why))


def nothing(why: str) -> Ceiling:
    """The ceiling of a technique that saves no time here, with the reason."""
    return Ceiling(1.0, "none", 0.0, "modelled", why)


def passes_ceiling(
    decode_share: float,
    tokens_per_pass: float,
    *,
    pass_cost: float = 1.0,
    label: Label = "modelled",
) -> Ceiling:
    """Several tokens from one pass (drafts, trees, merged emissions).

    `tokens_per_pass` is the most that a pass can yield (a draft of four gives at most five),
    `pass_cost` how many plain passes one such pass costs, drafting included: at least
    `verify_cost` of its width.
    """
    why = f"a pass yields at most {tokens_per_pass:g} tokens"
    if pass_cost != 1.0:
        why += f" and costs {pass_cost:.2f} plain passes"
    return ceiling("passes", decode_share, tokens_per_pass / pass_cost, label=label, why=why)


def verify_cost(work: TokenWork, limits: Limits, num_tokens: int, *, dtype: str = "fp32") -> float:
    """Cost of a pass over `num_tokens` tokens at once, in plain passes (modelled, at least 1).

    Weights and cache are read once for all of them; the arithmetic grows with their number.
    """
    one = seconds_per_token(work, limits, dtype=dtype)
    many = TokenWork(work.weight_bytes, work.cache_bytes, work.flops * num_tokens, work.calls)
    if one.seconds == 0.0:
        return 1.0
    return max(1.0, seconds_per_token(many, limits, dtype=dtype).seconds / one.seconds)


def modelled_shares(
    work: TokenWork,
    limits: Limits,
    *,
    decode_seconds_per_token: float,
    decode_share: float,
    spread_rest: bool = True,
) -> dict[Term, float]:
    """Share of the whole time that each term is, from bytes at the measured bandwidth.

    `decode_seconds_per_token` and `decode_share` are measured. Bytes explain only part of decoding;
    the rest is arithmetic, small calls and Python. `spread_rest` gives it to weights and cache by
    their bytes, which errs on the high side, as a ceiling should; without it the shares are what
    they are at least. "weight_bytes" and "cache_bytes" add up to no more than "passes".
    """
    reading = work.total_bytes / limits.bandwidth_for(work.total_bytes) if work.total_bytes else 0.0
    explained = min(1.0, reading / decode_seconds_per_token)
    busy = 1.0 if spread_rest and work.total_bytes else explained
    weights = work.weight_bytes / work.total_bytes if work.total_bytes else 0.0
    return {
        "passes": decode_share,
        "weight_bytes": decode_share * busy * weights,
        "cache_bytes": decode_share * busy * (1.0 - weights),
        "prefill": 1.0 - decode_share,
        "none": 0.0,
    }


def cache_share_from_lengths(
    short_length: int, short_seconds: float, long_length: int, long_seconds: float, at_length: float
) -> float:
    """Share of a decoding step that grows with the cache, from two measured step times.

    A straight line through seconds per token at two context lengths; its slope is what the cache
    costs (reading and attention), including what no model of bytes knows. Clipped to [0, 1]: noise
    may make the longer context look cheaper.
    """
    if long_length <= short_length:
        raise ValueError(f"two different lengths are needed, not {short_length} and {long_length}")
    slope = (long_seconds - short_seconds) / (long_length - short_length)
    at_seconds = short_seconds + slope * (at_length - short_length)
    return min(1.0, max(0.0, slope * at_length / at_seconds)) if at_seconds > 0 else 0.0


def reached(ratio: float, ceiling: float | Ceiling | None) -> float | None:
    """Share of the time that could be saved at most which was in fact saved.

    1.0 stands for the ceiling, 0 for no gain, less for a slow-down, more for a ceiling that was
    modelled too low (shown as it is, so that the model can be mended). None where there was
    nothing to gain or the ceiling is unknown.
    """
    value = ceiling.value if isinstance(ceiling, Ceiling) else ceiling
    if value is None or not value > 1.0 or not ratio > 0.0:
        return None
    # 1 / infinity is 0: then all of the time could be saved.
    return (1.0 - 1.0 / ratio) / (1.0 - 1.0 / value)


def _sentence(term: Term, share: float, factor: float, value: float, why: str) -> str:
    if term == "none":
        return why or "saves no time here"
    be = "are" if term in _PLURAL else "is"
    if share == 0.0:
        return f"{_WORDS[term]} {be} none of the time, so there is nothing to gain"
    cheaper = "free" if math.isinf(factor) else f"{factor:.2f}x cheaper"
    most = "without bound" if math.isinf(value) else f"{value:.2f}x"
    text = f"{_WORDS[term]} {be} {share:.0%} of the time, and {cheaper} at best: {most}"
    return f"{text} ({why})" if why else text
