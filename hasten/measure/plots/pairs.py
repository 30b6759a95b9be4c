"""The matrix of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hasten.measure import view
from hasten.measure.plots.canvas import BAD, GOOD, INK, MUTED, SOFT, WARN, both, new_figure, wrapped
from hasten.measure.view import number, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND_COLOURS = {"additive": GOOD, "sub-additive": WARN, "broken": BAD, "refused": MUTED}


def pairs_plot(result: Mapping[str, Any]) -> str:
    """The pair matrix: speed ratio of both together, coloured by how they combine."""
    return both(_draw_pairs, result, "pairs", "Speed ratios of techniques in pairs")


def _draw_pairs(result: Any, width: float) -> Figure | None:
    pairs = [pair for pair in view.objects(result, "pairs") if "a" in pair and "b" in pair]
    if not pairs:
        return None
    names: list[str] = []
    alone: dict[str, float | None] = {}
    for pair in pairs:
        for side in ("a", "b"):
            name = text(pair, side)
            if name not in names:
                names.append(name)
            if alone.get(name) is None:
                alone[name] = number(pair, f"ratio_{side}")
    narrow = width < 5
    cell = min((width - (1.0 if narrow else 2.6)) / len(names), 1.25)
    left = 1.0 if narrow else 2.3
    height = min(cell, 0.75) * len(names) + 0.75
    figure, axes = new_figure(width, height)
    figure.subplots_adjust(
        left=left / width,
        right=(left + cell * len(names)) / width,
        top=1 - 0.1 / height,
        bottom=0.65 / height,
    )
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines["bottom"].set_visible(False)

    def fill(x: int, y: int, ratio: float | None, kind: str, colour: str, weight: float) -> None:
        axes.add_patch(_cell(x, y, colour, weight))
        words = view.times(ratio) + (f"\n{kind}" if kind and cell > 0.85 else "")
        size = 9 if cell > 0.7 else 7.5
        axes.annotate(words, (x, y), ha="center", va="center", fontsize=size, linespacing=1.3)

    for place, name in enumerate(names):
        fill(place, place, alone[name], "alone", SOFT, 1.0)
    for pair in pairs:
        kind = text(pair, "kind")
        colour = KIND_COLOURS.get(kind, MUTED)
        first, second = sorted((names.index(text(pair, "a")), names.index(text(pair, "b"))))
        fill(first, second, number(pair, "ratio_ab"), kind, colour, 0.28)
    axes.set_xticks(range(len(names)), [wrapped(n, 10 if narrow else 14, most=2) for n in names])
    axes.set_yticks(range(len(names)), [wrapped(n, 12 if narrow else 28, most=2) for n in names])
    axes.tick_params(length=0, labelcolor=INK, labelsize=8 if narrow else 9)
    return figure


def _cell(x: int, y: int, colour: str, alpha: float) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch(
        (x - 0.44, y - 0.42),
        0.88,
        0.84,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=colour,
        alpha=alpha,
        linewidth=0,
    )
