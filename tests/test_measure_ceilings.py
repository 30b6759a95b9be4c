"""Ceilings: arithmetic that can be done by hand."""

from __future__ import annotations

import math

import pytest

from hasten.measure.ceilings import (
    Ceiling,
    TokenWork,
    amdahl,
    cache_share_from_lengths,
    ceiling,
    modelled_shares,
    nothing,
    passes_ceiling,
    reached,
    seconds_per_token,
    verify_cost,
)
from hasten.measure.limits import Limits


@pytest.fixture
def machine_limits() -> Limits:
    """Round figures: 10 GB/s, 100 Gop/s in fp32, no int8, 1 microsecond a call."""
    return Limits(
        device="cpu",
        threads=1,
        bandwidth=1e10,
        streamed_bytes=2**28,
        cached_bandwidth={2**22: 1e10},
        matrix_rate={"fp32": 1e11, "bf16": 2e11, "int8": None},
        unsupported={"int8": "unsupported: test"},
        dispatch_seconds=1e-6,
        other_load=None,
        fingerprint="test",
        versions={},
        measured_at="",
    )


def test_amdahl() -> None:
    assert amdahl(0.5, 2.0) == pytest.approx(4 / 3)
    assert amdahl(0.0, 10.0) == 1.0
    assert amdahl(0.5, math.inf) == 2.0
    assert amdahl(1.0, math.inf) == math.inf
    assert amdahl(0.5, 0.5) == pytest.approx(2 / 3)
    for share, factor in ((1.1, 2.0), (-0.1, 2.0), (0.5, 0.0), (0.5, math.nan)):
        with pytest.raises(ValueError, match=r"must be positive|lies between"):
            amdahl(share, factor)


def test_the_floor_is_what_takes_longest(machine_limits: Limits) -> None:
    bound = seconds_per_token(TokenWork(9e7, 1e7, 1e8, 10), machine_limits)
    assert bound.bound_by == "memory"
    assert bound.seconds == bound.memory_seconds == pytest.approx(0.01)
    assert bound.compute_seconds == pytest.approx(0.001)
    assert seconds_per_token(TokenWork(1e6, flops=1e10), machine_limits).bound_by == "compute"
    assert seconds_per_token(TokenWork(1e3, calls=500), machine_limits).bound_by == "dispatch"
    # A rate that is unknown sets no floor.
    assert seconds_per_token(TokenWork(1e6, flops=1e12), machine_limits, dtype="int8").seconds < 1


def test_a_technique_that_saves_passes() -> None:
    found = passes_ceiling(0.9, 5)
    assert found.value == pytest.approx(1 / (0.1 + 0.9 / 5))
    assert (found.term, found.label) == ("passes", "modelled")
    assert "90%" in found.detail and "5 tokens" in found.detail
    assert passes_ceiling(0.9, 5, pass_cost=2.5).value < found.value


def test_verifying_is_free_while_memory_bounds(machine_limits: Limits) -> None:
    work = TokenWork(weight_bytes=1e8, flops=1e8)
    assert verify_cost(work, machine_limits, 4) == 1.0
    assert verify_cost(work, machine_limits, 100) == pytest.approx(10.0)


def test_a_cache_technique_gains_no_more_than_the_cache(machine_limits: Limits) -> None:
    work = TokenWork(weight_bytes=9e7, cache_bytes=1e7)
    shares = modelled_shares(work, machine_limits, decode_seconds_per_token=0.02, decode_share=0.8)
    assert shares["cache_bytes"] == pytest.approx(0.08)
    assert shares["weight_bytes"] + shares["cache_bytes"] == pytest.approx(shares["passes"])
    assert shares["prefill"] == pytest.approx(0.2)
    found = ceiling("cache_bytes", shares["cache_bytes"], 4.0, label="modelled")
    assert found.value == pytest.approx(1 / (0.92 + 0.02))
    # Without spreading, only what the bytes explain: half of the decoding time here.
    least = modelled_shares(
        work,
        machine_limits,
        decode_seconds_per_token=0.02,
        decode_share=0.8,
        spread_rest=False,
    )
    assert least["cache_bytes"] == pytest.approx(0.04)


def test_the_cache_share_can_be_measured() -> None:
    # 1 ms fixed and 1 ms per thousand entries.
    share = cache_share_from_lengths(1000, 0.002, 3000, 0.004, at_length=1000)
    assert share == pytest.approx(0.5)
    assert cache_share_from_lengths(1000, 0.004, 3000, 0.003, at_length=1000) == 0.0
    with pytest.raises(ValueError, match="different lengths"):
        cache_share_from_lengths(5, 1.0, 5, 1.0, 5)


def test_reached_is_a_share_of_the_saving() -> None:
    assert reached(2.0, 2.0) == 1.0
    assert reached(1.0, 2.0) == 0.0
    assert reached(4 / 3, 2.0) == pytest.approx(0.5)
    assert reached(0.5, 2.0) == pytest.approx(-2.0)
    assert reached(2.0, math.inf) == 0.5
    assert reached(3.0, 2.0) == pytest.approx(4 / 3)  # a ceiling that was too low is not hidden
    assert reached(1.1, 1.0) is None
    assert reached(1.1, None) is None
    assert reached(1.0, Ceiling(2.0, "passes", 0.5, "measured", "")) == 0.0


def test_nothing_to_save() -> None:
    found = nothing("the prompt is one token long")
    assert (found.value, found.term) == (1.0, "none")
    assert reached(1.0, found) is None
    assert ceiling("prefill", 1.0, math.inf, label="measured").to_dict()["value"] is None
    assert ceiling("passes", 0.9, 9.0, label="modelled", limit=1.5).value == 1.5
