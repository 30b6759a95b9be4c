"""Speed ratios beside their ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hasten.measure import view
from hasten.measure.plots.canvas import (
    ACCENT,
    BAD,
    GOOD,
    INK,
    MUTED,
    ODD,
    PAPER,
    SOFT,
    WARN,
    bar_axes,
    both,
    wrapped,
)
from hasten.measure.view import number, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VERDICT_COLOURS = {"faster": GOOD, "no gain": WARN, "inactive": ODD, "broken": BAD}


def ratio_plot(result: Mapping[str, Any]) -> str:
    """Speed ratios with their intervals (measured) beside the ceilings."""
    return both(_draw_ratios, result, "ratios", "Speed ratio of each plan beside its ceiling")


def _draw_ratios(result: Any, width: float) -> Figure | None:
    rows = [row for row in view.rows(result) if number(row, "ratio", "median")]
    if not rows:
        return None
    figure, axes, places = bar_axes([view.plan_name(row) for row in rows], width, right=0.75)
    seen = [1.0]
    for row in rows:
        seen += [v for key in ("median", "low", "high") if (v := number(row, "ratio", key))]
    ceilings = [c for row in rows if (c := number(row, "ceiling")) is not None]
    # A ceiling far beyond what was reached would squeeze everything else into a corner.
    right = min(max([*seen, *ceilings]), 3 * max(seen))
    left = min(0.0 if min(seen) < 0.5 else 0.5, min(seen))
    axes.set_xlim(left, left + (right - left) * 1.06)
    edge = axes.get_xlim()[1]
    axes.axvline(1.0, color=INK, linewidth=1.0)
    for y, row in zip(places, rows, strict=True):
        ceiling = number(row, "ceiling")
        if ceiling is not None and ceiling > 1.0:
            shown = min(ceiling, edge)
            axes.barh(y, shown - 1.0, left=1.0, height=0.15, color=SOFT, linewidth=0)
            if ceiling <= edge:
                axes.plot([ceiling] * 2, [y - 0.1, y + 0.1], color=MUTED, linewidth=1.6)
            else:
                axes.annotate(
                    f"ceiling {view.times(ceiling)} ▸",
                    (edge, y),
                    xytext=(-4, 0),
                    fontsize=8,
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    color=MUTED,
                )
        middle = number(row, "ratio", "median") or 0.0
        colour = VERDICT_COLOURS.get(text(row, "verdict"), ACCENT)
        low, high = number(row, "ratio", "low"), number(row, "ratio", "high")
        if low is not None and high is not None:
            axes.plot(
                [low, high], [y, y], color=colour, linewidth=3.2, solid_capstyle="round", alpha=0.55
            )
        axes.plot([middle], [y], "o", color=colour, markersize=7, markeredgecolor=PAPER)
        axes.annotate(
            view.times(middle),
            (1, y),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            ha="left",
            fontweight="bold",
            color=colour,
        )
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    label = "speed ratio to the baseline, measured; higher is faster"
    axes.set_xlabel(wrapped(label, 40 if width < 5 else 100))
    return figure
