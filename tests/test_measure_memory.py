"""Peak memory: what a block used must show, also after it was freed."""

from __future__ import annotations

import time

import pytest
import torch

from hasten.measure import memory
from hasten.measure.memory import peak_memory, resident_bytes

MIB = 2**20


@pytest.fixture(params=["kernel", "sampled"])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of looking, where this machine has both."""
    if request.param == "sampled":
        monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    elif not memory._reset_high_water():
        pytest.skip("this kernel does not let a process reset its high-water mark")
    return str(request.param)


def hold(mib: int) -> None:
    """Fill memory, free it again, and meanwhile let the sampling thread look many times."""
    block = torch.ones(mib * MIB // 4)
    time.sleep(40 * memory.SAMPLE_SECONDS)
    assert block[-1] == 1


def test_a_freed_block_still_counts(method: str) -> None:
    with peak_memory() as peak:
        hold(96)
    assert method in peak.method
    assert 90 * MIB < peak.growth_bytes < 160 * MIB
    assert peak.bytes == peak.start_bytes + peak.growth_bytes
    with peak_memory() as after:
        pass
    assert after.growth_bytes < 32 * MIB


def test_blocks_may_be_nested(method: str) -> None:
    with peak_memory() as outer:
        hold(96)
        with peak_memory() as inner:
            hold(32)
        with peak_memory():
            pass
    assert 25 * MIB < inner.growth_bytes < 80 * MIB
    assert outer.growth_bytes > 90 * MIB


def test_an_error_inside_passes_through(method: str) -> None:
    with pytest.raises(RuntimeError, match="inside"), peak_memory() as outer:
        with peak_memory():
            hold(64)
        raise RuntimeError("inside")
    assert outer.growth_bytes > 55 * MIB
    assert memory._open == []


def test_without_proc_the_process_maximum_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_high_water", lambda: False)
    monkeypatch.setattr(memory, "resident_bytes", lambda: None)
    with peak_memory() as peak:
        pass
    assert peak.method == "process maximum"
    assert peak.bytes > 16 * MIB


def test_resident_bytes() -> None:
    now = resident_bytes()
    assert now is None or now > 16 * MIB
