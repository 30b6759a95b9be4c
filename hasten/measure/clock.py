"""Interleaved timing: A B B A A B ..., in one process, compared pair by pair.

The rules, each broken by a known toolkit: the baseline runs beside the candidate and not before
it, both ends of a timed region are synchronised, throughput is total tokens over total time, and
nothing is quoted from one run.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from hasten.errors import HastenError
from hasten.measure.stats import iqr, median, median_coverage, median_interval

MIN_ROUNDS = 5

Tick = Callable[[int, int, str], None]
"""Called as tick(done, total, what comes next), never inside a timed region."""


def synchronise(device: torch.device | str | None = None) -> None:
    """Wait until the device has done all that was asked of it. Does nothing on a CPU."""
    kind = torch.device(device).type if device is not None else "cpu"
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
    elif kind == "xpu":
        torch.xpu.synchronize(device)


class Stopwatch:
    """Seconds between two synchronised points. Use `with stopwatch(device) as watch`."""

    seconds: float = math.nan


@contextmanager
def stopwatch(device: torch.device | str | None = None) -> Iterator[Stopwatch]:
    """Time a block with the device idle at both ends; read `.seconds` after it."""
    watch = Stopwatch()
    synchronise(device)
    start = time.perf_counter()
    yield watch
    synchronise(device)
    watch.seconds = time.perf_counter() - start


@dataclass(frozen=True)
class Sample:
    """One timed call. The contender times itself, so that only its work is inside.

    `tokens` counts output ids, by the same counter for every contender. `phases` holds seconds and
    counts by name ("prefill_seconds", "decode_seconds", "passes", ...); `extra` is carried along.
    """

    seconds: float
    tokens: int
    phases: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"a sample needs a positive time, not {self.seconds} s")
        if self.tokens < 0:
            raise ValueError(f"a sample cannot hold {self.tokens} tokens")

    @property
    def tokens_per_second(self) -> float:
        """All tokens over all seconds."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one contender's own figure."""

    median: float
    iqr: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """{"median": ..., "iqr": [first quartile, third quartile]}."""
        return {"median": self.median, "iqr": list(self.iqr)}


@dataclass(frozen=True)
class Ratio:
    """A speed ratio to the baseline: above 1 is faster.

    `median` is the median over rounds of (candidate's tokens/s) / (baseline's tokens/s in the same
    round). `low` and `high` bound that median at 95 %: a seeded bootstrap over rounds, widened to
    the exact order-statistic interval where that is wider (always so for few rounds; at five rounds
    it is the whole range, which covers 93.75 %). `coverage` is the probability that is reached.
    The interval knows the noise of this run only, not that of another day. With a single round
    there is none, and `low` and `high` are None.
    """

    median: float
    low: float | None
    high: float | None
    num_rounds: int
    coverage: float

    @property
    def is_faster(self) -> bool:
        """The whole interval lies above 1."""
        return self.low is not None and self.low > 1.0

    @property
    def is_slower(self) -> bool:
        """The whole interval lies below 1."""
        return self.high is not None and self.high < 1.0

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return {
            "median": self.median,
            "low": self.low,
            "high": self.high,
            "rounds": self.num_rounds,
            "coverage": self.coverage,
        }


@dataclass(frozen=True)
class Timings:
    """What `interleave` measured: samples by contender, one per round, in round order."""

    baseline: str
    samples: Mapping[str, tuple[Sample, ...]]
    order: tuple[tuple[str, ...], ...]
    quick: bool
    seed: int

    @property
    def num_rounds(self) -> int:
        """Timed rounds, warm-up not counted."""
        return len(self.order)

    def tokens_per_second(self, name: str) -> Spread:
        """Median and quartiles over rounds of total tokens / total seconds."""
        return _spread([sample.tokens_per_second for sample in self._of(name)])

    def seconds(self, name: str) -> Spread:
        """Median and quartiles of the seconds of one call."""
        return _spread([sample.seconds for sample in self._of(name)])

    def phase(self, name: str, phase: str) -> Spread | None:
        """Median and quartiles of one phase's figure; None where no sample has it."""
        values = [sample.phases[phase] for sample in self._of(name) if phase in sample.phases]
        return _spread(values) if values else None

    def ratio(self, name: str, to: str | None = None) -> Ratio:
        """Speed ratio of a contender to the baseline, or to the contender named by `to`."""
        pairs = zip(self._of(name), self._of(to or self.baseline), strict=True)
        ratios = [ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs]
        low, high = median_interval(ratios, seed=self.seed) or (None, None)
        return Ratio(median(ratios), low, high, len(ratios), median_coverage(len(ratios)))

    def _of(self, name: str) -> tuple[Sample, ...]:
        if name not in self.samples:
            raise KeyError(f"no contender {name!r}; there are {', '.join(self.samples)}")
        return self.samples[name]


def interleave(
    contenders: Mapping[str, Callable[[], Sample]],
    *,
    rounds: int = MIN_ROUNDS,
    warmup: int = 1,
    on_tick: Tick | None = None,
    quick: bool = False,
    seed: int = 0,
) -> Timings:
    """Time contenders turn by turn in one process; the first is the baseline.

    Each round calls every contender once. The order changes from round to round by a balanced
    design (`round_order`), so that a drift of the clock speed or a cache left warm by the neighbour
    falls on all alike: two contenders run A B, B A, A B, ... `warmup` rounds come first and are
    thrown away. Garbage is collected between calls, never inside one.

    Fewer than five rounds are refused unless `quick` is set; such timings are marked and must be
    shown as preliminary. A contender's own exception passes through. Raises HastenError for too few
    rounds or a contender that produced no token.
    """
    names = tuple(contenders)
    if not names:
        raise ValueError("there is nothing to time")
    if rounds < 1 or warmup < 0:
        raise HastenError(f"rounds must be at least 1 and warm-up 0, not {rounds} and {warmup}")
    if rounds < MIN_ROUNDS and not quick:
        raise HastenError(
            f"{rounds} rounds are too few to compare speeds: give at least {MIN_ROUNDS}, "
            "or ask for a quick, preliminary result"
        )
    tick = on_tick or (lambda done, total, label: None)
    kept: dict[str, list[Sample]] = {name: [] for name in names}
    orders: list[tuple[str, ...]] = []
    done, total = 0, (warmup + rounds) * len(names)
    with _still_collector():
        for number in range(warmup + rounds):
            timed = number >= warmup
            # Warm-up continues the same design backwards, so that timing starts at its first row.
            order = tuple(names[i] for i in round_order(len(names), number - warmup))
            for name in order:
                tick(done, total, name if timed else f"{name} (warm-up)")
                gc.collect()
                sample = contenders[name]()
                if sample.tokens == 0:
                    raise HastenError(f"{name} produced no token, so there is no speed to measure")
                if timed:
                    kept[name].append(sample)
                done += 1
            if timed:
                orders.append(order)
    tick(total, total, "")
    samples = MappingProxyType({name: tuple(taken) for name, taken in kept.items()})
    return Timings(names[0], samples, tuple(orders), rounds < MIN_ROUNDS, seed)


def round_order(num_contenders: int, number: int) -> tuple[int, ...]:
    """Order of play in one round, a row of a Williams design.

    Over a whole cycle (n rounds for even n, 2n for odd n) each contender stands at each place
    equally often and follows each other one equally often.
    """
    n = num_contenders
    # First row 0, n-1, 1, n-2, ...: neighbours differ by every distance once.
    zigzag = [(i // 2) if i % 2 == 0 else n - 1 - i // 2 for i in range(n)]
    row = number % (n if n % 2 == 0 else 2 * n)
    if row >= n:  # the mirrored half that odd n needs
        zigzag.reverse()
    return tuple((place + row) % n for place in zigzag)


@contextmanager
def _still_collector() -> Iterator[None]:
    """Switch automatic garbage collection off, and freeze what is alive now.

    Frozen objects are skipped by the explicit collections between samples, which are therefore
    cheap even beside a large model. A freeze of the caller's own is left alone.
    """
    was_on = gc.isenabled()
    gc.collect()
    freezes = gc.get_freeze_count() == 0
    gc.disable()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        if was_on:
            gc.enable()


def _spread(values: list[float]) -> Spread:
    return Spread(median(values), iqr(values))
