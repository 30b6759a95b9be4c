"""What all plots share: colours, style, axes with named rows, and how a figure becomes inline SVG."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError

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
    """A figure of so many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def bar_axes(
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


def wrapped(name: str, columns: int, most: int = 3) -> str:
    """A name in at most so many lines, cut with an ellipsis."""
    lines = textwrap.wrap(name, columns, break_long_words=True) or [""]
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1][: columns - 1] + "…"]
    return "\n".join(lines)
