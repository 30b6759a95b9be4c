"""Measuring the machine, briefly, and keeping what was found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hasten.errors import HastenError
from hasten.measure import limits as module
from hasten.measure.limits import MIB, Limits, cache_path, limits, measure_limits


@pytest.fixture(scope="module")
def measured() -> Limits:
    """One short measurement serves all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_streaming_bytes", lambda device: 64 * MIB)
        return measure_limits(torch.device("cpu"), seconds=0.5)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, measured: Limits, tmp_path: Path) -> list[int]:
    """Replaces measuring by a counter, in a data folder of its own."""
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    calls: list[int] = []

    def measure(device: torch.device, **_: object) -> Limits:
        calls.append(1)
        return measured

    monkeypatch.setattr(module, "measure_limits", measure)
    return calls


def test_figures_are_plausible(measured: Limits) -> None:
    assert 1e8 < measured.bandwidth < 1e13
    for name in ("fp32", "bf16"):
        rate = measured.matrix_rate[name]
        assert rate is not None and 1e8 < rate < 1e16
    assert 1e-8 < measured.dispatch_seconds < 1e-3
    assert measured.matrix_rate["int8"] is not None or "unsupported" in measured.unsupported["int8"]
    assert measured.threads == torch.get_num_threads()


def test_an_unsupported_type_is_labelled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise RuntimeError("no int8 here\nlong trace")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    monkeypatch.setattr(module, "_streaming_bytes", lambda device: 4 * MIB)
    monkeypatch.setattr(module, "WORKING_SETS", ())
    monkeypatch.setattr(module, "MATRIX_TYPES", {"int8": torch.int8})
    found = measure_limits(torch.device("cpu"), seconds=0.01)
    assert found.matrix_rate == {"int8": None}
    assert found.unsupported == {"int8": "unsupported: no int8 here"}


def test_a_smaller_working_set_is_never_slower(measured: Limits) -> None:
    rates = [measured.bandwidth_for(size) for size in (0, 1, 4e6, 2e7, 3e7, 6.4e7, 1e9, 1e12)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(measured.bandwidth)


def test_interpolation_between_sizes(measured: Limits) -> None:
    known = replace(
        measured, bandwidth=1e9, streamed_bytes=2**28, cached_bandwidth={2**20: 4e9, 2**24: 1e9}
    )
    assert known.bandwidth_for(2**22) == pytest.approx(2e9)
    # A noisy dip at a small size is mended by what a larger one reached.
    dip = replace(known, cached_bandwidth={2**20: 0.5e9, 2**24: 2e9})
    assert dip.bandwidth_for(2**20) == pytest.approx(2e9)


def test_fraction_of_limit(measured: Limits) -> None:
    known = replace(
        measured,
        bandwidth=1e10,
        cached_bandwidth={2**22: 1e11},
        matrix_rate={"fp32": 1e11, "bf16": 2e11, "int8": None},
    )
    assert known.fraction_of_limit(bytes_per_second=5e9) == pytest.approx(0.5)
    assert known.fraction_of_limit(bytes_per_second=5e9, working_set_bytes=2**20) == pytest.approx(
        0.05
    )
    assert known.fraction_of_limit(bytes_per_second=1e9, flops_per_second=9e10) == pytest.approx(
        0.9
    )
    assert known.fraction_of_limit(flops_per_second=9e10, dtype="bf16") == pytest.approx(0.45)
    assert known.fraction_of_limit(flops_per_second=9e10, dtype="int8") is None
    assert known.fraction_of_limit() is None


def test_kept_between_calls(counted: list[int]) -> None:
    first = limits()
    assert limits() == first and len(counted) == 1
    limits(refresh=True)
    assert len(counted) == 2
    path = cache_path(torch.device("cpu"))
    assert json.loads(path.read_text())["label"] == "measured"
    assert Limits.from_dict(json.loads(path.read_text())) == first
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"schema": 0}', "null", '{"schema": 1}'])
def test_a_damaged_file_is_measured_anew(counted: list[int], damage: str) -> None:
    limits()
    path = cache_path(torch.device("cpu"))
    path.write_text(damage)
    limits()
    assert len(counted) == 2
    assert json.loads(path.read_text())["schema"] == module.SCHEMA


def test_other_versions_threads_and_devices_have_files_of_their_own(
    counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache_path(torch.device("cpu"))
    assert cache_path(torch.device("cuda")) != before
    monkeypatch.setattr(module, "versions", lambda: {"torch": "0"})
    assert cache_path(torch.device("cpu")) != before


def test_an_unwritable_home_is_known_before_measuring(
    counted: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "file"))
    with pytest.raises(HastenError, match="HASTEN_HOME"):
        limits()
    assert counted == []


def test_other_work_is_noticed(measured: Limits) -> None:
    assert replace(measured, threads=2, other_load=1.2).is_disturbed
    assert not replace(measured, threads=2, other_load=0.1).is_disturbed
    assert not replace(measured, other_load=None).is_disturbed


def test_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert module._best_seconds(lambda: None, torch.device("cpu"), 0.01) < math.inf
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
