"""Interleaved timing: order, fairness, and what is refused."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest

from hasten.errors import HastenError
from hasten.measure.clock import Sample, interleave, round_order, stopwatch


def fixed(
    seconds: float, tokens: int = 10, log: list[str] | None = None, name: str = ""
) -> Callable[[], Sample]:
    def call() -> Sample:
        if log is not None:
            log.append(name)
        return Sample(seconds, tokens)

    return call


def test_a_contender_twice_as_slow_has_half_the_speed() -> None:
    def sleeper(seconds: float) -> Callable[[], Sample]:
        def call() -> Sample:
            with stopwatch() as watch:
                time.sleep(seconds)
            return Sample(watch.seconds, 8)

        return call

    timings = interleave({"fast": sleeper(0.03), "slow": sleeper(0.06)})
    ratio = timings.ratio("slow")
    assert ratio.median == pytest.approx(0.5, abs=0.12)
    assert ratio.low is not None and ratio.high is not None
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.num_rounds == 5 and ratio.coverage == pytest.approx(0.9375)
    assert timings.ratio("fast", to="slow").median == pytest.approx(2.0, rel=0.25)
    baseline = timings.ratio("fast")
    assert (baseline.median, baseline.low, baseline.high) == (1.0, 1.0, 1.0)


def test_turns_alternate_and_warm_up_is_thrown_away() -> None:
    log: list[str] = []
    calls = {name: fixed(1.0, 10, log, name) for name in "AB"}
    timings = interleave(calls, warmup=1)
    assert "".join(log) == "BA" + "ABBAABBAAB"
    assert timings.order == (("A", "B"), ("B", "A"), ("A", "B"), ("B", "A"), ("A", "B"))
    assert len(timings.samples["A"]) == len(timings.samples["B"]) == timings.num_rounds == 5
    assert timings.baseline == "A"


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6, 7])
def test_no_contender_always_follows_the_same_one(number: int) -> None:
    played = [place for turn in range(5) for place in round_order(number, turn)]
    before: dict[int, set[int]] = {place: set() for place in range(number)}
    for first, second in pairwise(played):
        before[second].add(first)
    assert all(len(found) >= 2 for found in before.values())


@pytest.mark.parametrize("number", [2, 3, 4, 5, 6])
def test_a_full_cycle_is_balanced(number: int) -> None:
    rows = [round_order(number, turn) for turn in range(number if number % 2 == 0 else 2 * number)]
    assert all(sorted(row) == list(range(number)) for row in rows)
    follows = Counter(pair for row in rows for pair in pairwise(row))
    places = Counter((place, who) for row in rows for place, who in enumerate(row))
    assert len(set(follows.values())) == 1 and len(follows) == number * (number - 1)
    assert len(set(places.values())) == 1


def test_drift_does_not_favour_a_place() -> None:
    """A machine that slows down steadily must not make equal contenders look different."""
    clock = iter(range(1000))

    def call() -> Sample:
        return Sample(1.0 + 0.01 * next(clock), 100)

    timings = interleave({"a": call, "b": call}, rounds=8)
    assert timings.ratio("b").median == pytest.approx(1.0, abs=0.005)


def test_few_rounds_are_refused_unless_asked_for() -> None:
    calls = {"a": fixed(1.0), "b": fixed(2.0)}
    with pytest.raises(HastenError, match="at least 5"):
        interleave(calls, rounds=4)
    timings = interleave(calls, rounds=2, quick=True)
    assert timings.quick and timings.ratio("b").coverage == 0.5
    single = interleave(calls, rounds=1, quick=True).ratio("b")
    assert single.low is None and single.high is None and not single.is_slower
    assert not interleave(calls).quick
    with pytest.raises(HastenError):
        interleave(calls, rounds=0, quick=True)
    with pytest.raises(ValueError, match="nothing"):
        interleave({})


def test_ratio_is_the_median_of_pairs_not_a_ratio_of_medians() -> None:
    first, second = iter([1, 1, 1, 10, 10, 10]), iter([2, 2, 2, 20, 20, 20])
    timings = interleave(
        {"a": lambda: Sample(next(first), 10), "b": lambda: Sample(next(second), 10)},
        warmup=0,
        rounds=6,
    )
    assert timings.ratio("b").median == 0.5
    assert timings.ratio("b").is_slower and not timings.ratio("b").is_faster


def test_throughput_is_total_tokens_over_total_time() -> None:
    calls = {"a": lambda: Sample(4.0, 10, {"prefill_seconds": 1.0}, {"ids": [1]})}
    timings = interleave(calls)
    assert timings.tokens_per_second("a").median == 2.5
    assert timings.tokens_per_second("a").to_dict() == {"median": 2.5, "iqr": [2.5, 2.5]}
    assert timings.seconds("a").median == 4.0
    phase = timings.phase("a", "prefill_seconds")
    assert phase is not None and phase.median == 1.0
    assert timings.phase("a", "decode_seconds") is None
    assert timings.samples["a"][0].extra["ids"] == [1]
    with pytest.raises(KeyError, match="no contender"):
        timings.ratio("z")


def test_the_collector_stays_still_inside_and_is_restored() -> None:
    states: list[bool] = []

    def call() -> Sample:
        states.append(gc.isenabled())
        return Sample(1.0, 1)

    assert gc.isenabled()
    interleave({"a": call})
    assert states == [False] * 6
    assert gc.isenabled() and gc.get_freeze_count() == 0

    def fail() -> Sample:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        interleave({"a": fail})
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    try:
        interleave({"a": call})
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_ticks_count_every_call() -> None:
    ticks: list[tuple[int, int, str]] = []
    calls = {"a": fixed(1.0), "b": fixed(1.0)}
    interleave(calls, warmup=1, on_tick=lambda *tick: ticks.append(tick))
    assert [done for done, _, _ in ticks] == list(range(13))
    assert {total for _, total, _ in ticks} == {12}
    assert ticks[0][2] == "b (warm-up)" and ticks[-1] == (12, 12, "")


def test_a_silent_contender_is_named() -> None:
    with pytest.raises(HastenError, match="mute produced no token"):
        interleave({"a": fixed(1.0), "mute": fixed(1.0, tokens=0)})


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sample_without_time_is_a_mistake(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive time"):
        Sample(seconds, 1)
