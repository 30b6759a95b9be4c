"""Bars of the baseline and of each plan: output rate, peak memory, bytes of cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hasten.measure import view
from hasten.measure.plots.canvas import ACCENT, INK, MUTED, bar_axes, both, wrapped
from hasten.measure.view import number, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def throughput_plot(result: Mapping[str, Any]) -> str:
    """Tokens per second (measured) beside the machine's limit for plain decoding (modelled)."""
    return both(_draw_throughput, result, "speed", "Output per second beside the limit")


def memory_plot(result: Mapping[str, Any]) -> str:
    """Peak memory of baseline and plans."""
    return both(_draw_memory, result, "memory", "Peak memory")


def cache_plot(result: Mapping[str, Any]) -> str:
    """Bytes of KV cache held by the plans."""
    return both(_draw_cache, result, "cache", "Bytes of KV cache")


def _draw_throughput(result: Any, width: float) -> Figure | None:
    entries: list[tuple[str, Any, str]] = []
    baseline = view.look(result, "baseline")
    naive = view.look(baseline, "naive")
    if view.output_rate(naive):
        entries.append((f"naive: {text(naive, 'runner')}", naive, MUTED))
    if view.output_rate(baseline):
        entries.append((f"baseline: {text(baseline, 'runner')}", baseline, INK))
    for row in view.rows(result):
        if view.output_rate(row):
            entries.append((view.plan_name(row), row, ACCENT))
    limit = view.rate_limit(result)
    return _bars(
        [(name, _rate_spread(item), colour) for name, item, colour in entries],
        width,
        view.plain_number,
        f"{view.RATES[view.rate_key(result)][0]}, measured",
        limit,
    )


def _rate_spread(item: Any) -> tuple[float, float | None, float | None]:
    return (
        view.output_rate(item) or 0.0,
        view.output_rate(item, "iqr", 0),
        view.output_rate(item, "iqr", 1),
    )


def _draw_memory(result: Any, width: float) -> Figure | None:
    entries = []
    baseline = number(result, "baseline", "peak_bytes")
    if baseline:
        name = f"baseline: {text(result, 'baseline', 'runner')}"
        entries.append((name, (baseline / 2**20, None, None), INK))
    for row in view.rows(result):
        peak = number(row, "peak_bytes")
        if peak:
            entries.append((view.plan_name(row), (peak / 2**20, None, None), ACCENT))
    return _bars(entries, width, view.plain_number, "peak memory in MiB, measured", None)


def _draw_cache(result: Any, width: float) -> Figure | None:
    entries = []
    baseline = number(result, "baseline", "cache_bytes")
    if baseline:
        name = f"baseline: {text(result, 'baseline', 'runner')}"
        entries.append((name, (baseline / 2**20, None, None), INK))
    for row in view.rows(result):
        held = number(row, "cache_bytes")
        if held:
            entries.append((view.plan_name(row), (held / 2**20, None, None), ACCENT))
    return _bars(entries, width, view.plain_number, "KV cache in MiB, measured", None)


def _bars(
    entries: Sequence[tuple[str, tuple[float, float | None, float | None], str]],
    width: float,
    words: Callable[[float | None], str],
    label: str,
    limit: float | None,
) -> Figure | None:
    """Horizontal bars with quartile whiskers, and a dashed line at a limit where it fits."""
    if not entries:
        return None
    figure, axes, places = bar_axes([name for name, _, _ in entries], width, right=0.75)
    largest = max(max(middle, high or 0.0) for _, (middle, _, high), _ in entries)
    fits = limit is not None and limit <= 3 * largest
    edge = 1.04 * max(largest, limit if fits and limit is not None else 0.0)
    axes.set_xlim(0, edge)
    for y, (_, (middle, low, high), colour) in zip(places, entries, strict=True):
        axes.barh(y, middle, height=0.16, color=colour, alpha=0.85, linewidth=0)
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=INK, linewidth=1.4, solid_capstyle="butt")
        axes.annotate(
            words(middle),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            fontweight="bold",
        )
    if limit is not None and fits:
        axes.axvline(limit, color=INK, linewidth=1.3, linestyle=(0, (4, 3)))
        label += f"; dashed: limit {words(limit)}, modelled"
    elif limit is not None:
        label += f"; limit {words(limit)}, modelled, beyond the edge"
    axes.set_xlabel(wrapped(label, 40 if width < 5 else 100))
    return figure
