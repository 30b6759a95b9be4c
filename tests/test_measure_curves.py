"""Quality against speed: which plans are one line, how they are told apart, what is drawn where."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.measure import curves
from hasten.measure.curves import quality_plot, series_of
from hasten.measure.plots.canvas import INK, MUTED, SERIES

pytest.importorskip("matplotlib")


def part(name: str, *, baseline: bool = False, **knobs: Any) -> dict[str, Any]:
    """A technique of a plan, with a default knob beside those that are written."""
    every = {"warmup": 0.1, **knobs}
    return {"name": name, "knobs": every, "written": list(knobs), "is_baseline": baseline}


def row(ratio: float, decibels: float, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    texts = []
    for each in parts:
        written = ", ".join(f"{knob}={each['knobs'][knob]}" for knob in each["written"])
        texts.append(f"{each['name']}({written})" if written else each["name"])
    return {
        "plan": ", ".join(texts),
        "ratio": {"median": ratio, "low": 0.95 * ratio, "high": 1.05 * ratio},
        "quality": {"psnr": {"value": decibels, "interval": [decibels - 1, decibels + 1], "unit": "dB"}},
        "verdict": "faster",
        "techniques": list(parts),
    } | more  # fmt: skip


def cache(threshold: float) -> dict[str, Any]:
    return part("easy_cache", threshold=threshold)


@pytest.fixture
def result() -> dict[str, Any]:
    """Invented figures."""
    return {
        "rows": [row(1.9, 30.0, cache(0.1)), row(1.5, 34.0, cache(0.05))],
        "beside": [
            row(2.6, 24.0, cache(0.2)),
            row(2.0, 25.0, part("fewer_steps", baseline=True, share=0.5)),
            row(1.3, 29.0, part("fewer_steps", baseline=True, share=0.75)),
            row(1.7, 28.0, part("reuse_always", baseline=True)),
            row(2.2, 27.0, part("zeus")),
            row(3.0, 22.0, cache(0.1), part("fixed_cut", baseline=True)),
        ],
    }


def test_a_technique_is_one_line_in_the_order_of_its_speed(result: dict[str, Any]) -> None:
    series = {one.name: one for one in series_of(result)}
    assert list(series) == ["easy_cache", "zeus", "easy_cache + fixed_cut", "fewer_steps", "reuse_always"]  # fmt: skip
    caches = series["easy_cache"]
    assert [point.ratio for point in caches.points] == [1.5, 1.9, 2.6]
    assert [caches.label(point) for point in caches.points] == ["0.05", "0.1", "0.2"]
    assert caches.remark == "by threshold" and not caches.is_baseline
    assert not series["easy_cache + fixed_cut"].is_baseline
    assert series["easy_cache + fixed_cut"].remark == "threshold=0.1"
    assert series["zeus"].remark == "" and series["zeus"].label(series["zeus"].points[0]) == ""


def test_baselines_are_told_apart(result: dict[str, Any]) -> None:
    series = {one.name: one for one in series_of(result)}
    steps, reuse = series["fewer_steps"], series["reuse_always"]
    assert steps.is_baseline and steps.colour == INK and steps.remark == "baseline, by share"
    assert reuse.is_baseline and reuse.colour == MUTED and reuse.marker != steps.marker
    ours = [one.colour for one in series.values() if not one.is_baseline]
    assert set(ours) <= set(SERIES) and len(set(ours)) == 3
    page = quality_plot(result)
    assert page.count("stroke-dasharray") >= 4  # both lines and both samples of the key
    for words in ("easy_cache", "fewer_steps", "baseline, by share", "by threshold", "0.05"):
        assert page.count(f">{words}<") >= 2, words  # on wide and on narrow screens


def test_several_knobs_are_named_at_their_points() -> None:
    rows = [
        row(1.5, 30.0, part("easy_cache", threshold=0.1, keep="output")),
        row(1.6, 29.0, part("easy_cache", threshold=0.2)),
        row(1.7, 28.0, part("easy_cache", threshold=0.2, keep="vector")),
    ]
    (series,) = series_of({"rows": rows})
    labels = [series.label(point) for point in series.points]
    assert labels == ["threshold=0.1, keep=output", "threshold=0.2, keep=none", "threshold=0.2, keep=vector"]  # fmt: skip
    assert series.remark == "by threshold and keep"


def test_pictures_that_are_the_same_do_not_flatten_the_rest(result: dict[str, Any]) -> None:
    result["beside"] += [row(1.02, 100.0, cache(0.01), verdict="inactive"), row(1.1, 58.0, cache(0.02))]  # fmt: skip
    page = quality_plot(result)
    assert page.count(">0.01: the same, 0.02: 58 dB<") == 2
    assert ">100<" not in page and ">60<" not in page  # nothing of the axis goes so far
    same = {"rows": [row(1.0, 100.0, cache(0.01)), row(1.1, 100.0, cache(0.02))]}
    assert ">100" in quality_plot(same)
    assert curves.MOST_DB < 48.2  # one grey level of 255


def test_results_without_techniques_are_drawn_by_plan(result: dict[str, Any]) -> None:
    for one in [*result["rows"], *result["beside"]]:
        del one["techniques"]
    assert [one.name for one in series_of(result)] == [r["plan"] for r in [*result["rows"], *result["beside"]]]  # fmt: skip
    assert quality_plot(result)


def test_what_cannot_share_an_axis_is_not_drawn(result: dict[str, Any]) -> None:
    assert quality_plot({}) == ""
    kept = {"perplexity": {"value": 3.0, "original": 3.0, "recovery": 0.99}}
    result["rows"][0]["quality"] = kept
    assert quality_plot(result) == ""
    for one in [*result["rows"], *result["beside"]]:
        one["quality"] = kept
    assert "99 %" in quality_plot(result) and "perplexity kept" in quality_plot(result)


@pytest.mark.parametrize(
    "broken", [None, "x", 3, [], {"knobs": 1}, {"name": None, "written": None}]
)
def test_damaged_pieces_never_crash(result: dict[str, Any], broken: Any) -> None:
    result["rows"][0]["techniques"] = broken
    result["rows"][1]["techniques"] = [broken]
    assert quality_plot(result)
