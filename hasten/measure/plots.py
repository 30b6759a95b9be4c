"""Plots of a bench result as inline SVG.

Each plot is drawn twice, for wide and for narrow screens, and the page shows the one that fits.
Colours are stand-ins while drawing and become CSS variables, so that one drawing serves light and
dark pages alike. Text stays text. A plot without data is an empty string.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError
from hasten.measure import view
from hasten.measure.view import number, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-in colour -> name of the page's CSS variable.
INK, MUTED, LINE, SOFT = "#010101", "#010102", "#010103", "#010104"
GOOD, WARN, BAD, ODD, ACCENT, PAPER = (
    "#010105",
    "#010106",
    "#010107",
    "#010108",
    "#010109",
    "#01010a",
)
SERIES = tuple(f"#0102{number:02x}" for number in range(1, 8))
"""Colours of techniques that are told apart by their colour."""

_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    SOFT: "soft",
    GOOD: "good",
    WARN: "warn",
    BAD: "bad",
    ODD: "odd",
    ACCENT: "accent",
    PAPER: "paper",
    **{colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)},
}
VERDICT_COLOURS = {"faster": GOOD, "no gain": WARN, "inactive": ODD, "broken": BAD}
KIND_COLOURS = {"additive": GOOD, "sub-additive": WARN, "broken": BAD, "refused": MUTED}

WIDE, NARROW = 9.6, 3.7  # inches at 72 points: about the width in CSS pixels of page and phone
TEXT_LINE = 0.155

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hasten",
    "text.parse_math": False,  # a plan may hold dollar signs
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}

Draw = Callable[[Any, float], "Figure | None"]


def ratio_plot(result: Mapping[str, Any]) -> str:
    """Speed ratios with their intervals (measured) beside the ceilings."""
    return both(_draw_ratios, result, "ratios", "Speed ratio of each plan beside its ceiling")


def throughput_plot(result: Mapping[str, Any]) -> str:
    """Tokens per second (measured) beside the machine's limit for plain decoding (modelled)."""
    return both(_draw_throughput, result, "speed", "Output per second beside the limit")


def memory_plot(result: Mapping[str, Any]) -> str:
    """Peak memory of baseline and plans."""
    return both(_draw_memory, result, "memory", "Peak memory")


def cache_plot(result: Mapping[str, Any]) -> str:
    """Bytes of KV cache held by the plans."""
    return both(_draw_cache, result, "cache", "Bytes of KV cache")


def pairs_plot(result: Mapping[str, Any]) -> str:
    """The pair matrix: speed ratio of both together, coloured by how they combine."""
    return both(_draw_pairs, result, "pairs", "Speed ratios of techniques in pairs")


def both(draw: Draw, result: Mapping[str, Any], name: str, title: str) -> str:
    """The same plot for wide and narrow screens, wrapped for the page."""
    try:
        import matplotlib
    except ImportError as error:
        raise HastenError(
            "a report needs matplotlib, which is not installed; run: pip install 'hasten[report]'"
        ) from error
    parts = []
    with matplotlib.rc_context(_STYLE):
        for kind, width in (("wide", WIDE), ("narrow", NARROW)):
            figure = draw(result, width)
            if figure is None:
                return ""
            svg = _inline(figure, f"{name}-{kind}", title)
            parts.append(f'<div class="plot {kind}">{svg}</div>')
    return "\n".join(parts)


def _inline(figure: Figure, prefix: str, title: str) -> str:
    """The figure as an SVG element whose ids are its own on the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue().decode("utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # The page sets the width; the view box keeps the shape.
    head = f'<svg role="img" aria-label="{escape(title, quote=True)}"'
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(width|height)="[^"]*"', "", opening)
    return opening.replace("<svg", head, 1) + ">" + rest


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _bar_axes(
    names: Sequence[str], width: float, right: float = 0.3
) -> tuple[Figure, Axes, list[float]]:
    """Axes with one named row per entry, first on top; returns also the rows' places.

    The vertical unit is the inch, so that a name of three lines gets the room it needs. On a phone
    names stand above their rows, where the whole width is theirs.
    """
    narrow = width < 5
    labels = [wrapped(name, 46 if narrow else 32) for name in names]
    places, y = [], 0.0
    for label in labels:
        lines = label.count("\n") + 1
        tall = TEXT_LINE * lines + (0.32 if narrow else 0.23)
        places.append(y + tall - 0.17 if narrow else y + tall / 2)
        y += tall
    top, bottom = 0.06, 0.6
    figure, axes = new_figure(width, y + top + bottom)
    left = 0.05 if narrow else 2.5
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        top=1 - top / (y + top + bottom),
        bottom=bottom / (y + top + bottom),
    )
    axes.set_ylim(y, 0)
    axes.set_yticks([])
    for place, label in zip(places, labels, strict=True):
        axes.annotate(
            label,
            (0, place),
            xycoords=("axes fraction", "data"),
            xytext=(0, 9) if narrow else (-10, 0),
            textcoords="offset points",
            va="bottom" if narrow else "center",
            ha="left" if narrow else "right",
            fontsize=9,
            linespacing=1.15,
            zorder=6,
            # Covers the grid behind the words, which on a phone stand inside the plot.
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1.0},
        )
    axes.tick_params(length=0, pad=7)
    axes.grid(axis="x")
    return figure, axes, places


def _draw_ratios(result: Any, width: float) -> Figure | None:
    rows = [row for row in view.rows(result) if number(row, "ratio", "median")]
    if not rows:
        return None
    figure, axes, places = _bar_axes([view.plan_name(row) for row in rows], width, right=0.75)
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
    figure, axes, places = _bar_axes([name for name, _, _ in entries], width, right=0.75)
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


def wrapped(name: str, columns: int, most: int = 3) -> str:
    """A name in at most so many lines, cut with an ellipsis."""
    lines = textwrap.wrap(name, columns, break_long_words=True) or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: columns - 1] + "…"]
    return "\n".join(lines)
