"""Quality against speed, as one line for each technique: the same technique at several knobs.

Plans of the same techniques are one series, whose points are joined in the order of their speed.
Baselines, the plain rivals that no paper is about, are dashed, so that what has to be beaten is seen
at once. Names and the knobs that vary stand in a key beside the plot, values at their points.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import TYPE_CHECKING, Any

from hasten.measure import view
from hasten.measure.image_quality import MOST_DB as SAME_DB
from hasten.measure.plots.canvas import INK, MUTED, PAPER, SERIES, both, new_figure, wrapped
from hasten.measure.view import Quality, number, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_DB = 48.0  # pictures nearer than this differ by less than one of 256 levels of brightness
KEY_LINE = 0.17  # inches
SAMPLE = 0.36  # inches of a line in the key
MARKERS = ("s", "D", "v", "P", "h")  # of baselines in grey


@dataclass(frozen=True)
class Point:
    """One plan.

    Attributes:
        ratio, quality: what was measured.
        knobs: by (technique, knob); `written`: those that the plan writes down.
    """

    row: Any
    ratio: float
    quality: Quality
    knobs: Mapping[tuple[str, str], Any]
    written: Sequence[tuple[str, str]]

    @property
    def is_faster(self) -> bool:
        """Whether the plan was found to be faster, beyond the noise."""
        return text(self.row, "verdict") == "faster"


@dataclass
class Series:
    """Plans of the same techniques."""

    name: str
    is_baseline: bool
    points: list[Point] = field(default_factory=list)
    colour: str = INK
    marker: str = "o"

    @property
    def varying(self) -> list[tuple[str, str]]:
        """The knobs in which the points differ."""
        every = dict.fromkeys(key for point in self.points for key in point.knobs)
        values = {key: {repr(point.knobs.get(key)) for point in self.points} for key in every}
        return [key for key in every if len(values[key]) > 1]

    def label(self, point: Point) -> str:
        """What sets a point apart from the others of its series; empty for the only one."""
        varying = self.varying
        if len(varying) == 1:
            return _words(point.knobs.get(varying[0]))
        return _knobs(point, varying)

    @property
    def remark(self) -> str:
        """What the key says beside its name."""
        words = f"by {' and '.join(knob for _, knob in self.varying)}" if self.varying else ""
        if len(self.points) == 1:
            words = _knobs(self.points[0], self.points[0].written)
        return ", ".join(filter(None, ["baseline" if self.is_baseline else "", words]))


def _knobs(point: Point, keys: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{key[1]}={_words(point.knobs.get(key))}" for key in keys)


def _words(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def quality_plot(result: Mapping[str, Any]) -> str:
    """Quality against speed, a line for each technique, with intervals both ways."""
    return both(_draw, result, "quality", "Quality against speed ratio, a line for each technique")


def series_of(result: Any) -> list[Series]:
    """All measured plans that have a speed ratio and a quality; techniques first, then baselines."""
    found: dict[str, Series] = {}
    for row in view.rows(result):
        quality, ratio = view.main_quality(row), number(row, "ratio", "median")
        if quality is None or not ratio:
            continue
        parts = view.objects(row, "techniques")
        name = " + ".join(text(part, "name") for part in parts) or view.plan_name(row)
        baseline = bool(parts) and all(view.look(part, "is_baseline") is True for part in parts)
        series = found.setdefault(name, Series(name, baseline))
        series.points.append(Point(row, ratio, quality, *_knobs_of(parts)))
    ordered = sorted(found.values(), key=lambda one: one.is_baseline)
    _colour(ordered)
    for series in ordered:
        series.points.sort(key=lambda point: point.ratio)
    return ordered


def _knobs_of(
    parts: Sequence[Any],
) -> tuple[dict[tuple[str, str], Any], list[tuple[str, str]]]:
    """All knobs of a plan's techniques, and which of them it writes down."""
    knobs: dict[tuple[str, str], Any] = {}
    written: list[tuple[str, str]] = []
    for part in parts:
        name, chosen, said = (
            text(part, "name"),
            view.look(part, "knobs"),
            view.look(part, "written"),
        )
        if isinstance(chosen, Mapping):
            knobs |= {(name, knob): value for knob, value in chosen.items()}
        if isinstance(said, Sequence):
            written += [(name, str(knob)) for knob in said]
    return knobs, written


def _colour(series: Sequence[Series]) -> None:
    """A colour for each technique; ink for the baseline with the longest line, grey for others."""
    colours, markers = cycle(SERIES), cycle(MARKERS)
    baselines = [one for one in series if one.is_baseline]
    for one in series:
        if not one.is_baseline:
            one.colour = next(colours)
        elif one is not max(baselines, key=lambda other: len(other.points)):
            one.colour, one.marker = MUTED, next(markers)


def _draw(result: Any, width: float) -> Figure | None:
    series = series_of(result)
    points = [point for one in series for point in one.points]
    units = {point.quality.unit for point in points if point.quality.recovery is None}
    mixed = units and any(point.quality.recovery is not None for point in points)
    if not points or len(units) > 1 or mixed:
        return None  # nothing, or nothing that could share an axis
    unit = units.pop() if units else ""
    narrow = width < 5
    lines = list(_key_lines(series, 34 if narrow else 30))
    key = KEY_LINE * (sum(len(words) + 0.75 for _, words in lines))
    height = 3.3 + key if narrow else max(4.0, key + 0.8)
    figure, axes = new_figure(width, height)
    figure.subplots_adjust(
        left=(0.62 if narrow else 0.75) / width,
        right=1 - (0.15 if narrow else 3.1) / width,
        top=1 - 0.15 / height,
        bottom=(0.62 + (key if narrow else 0.0)) / height,
    )
    corner = (0.1, 0.02) if narrow else (width - 2.85, height - 0.15 - key)
    room = figure.add_axes(
        (corner[0] / width, corner[1] / height, (width - corner[0]) / width, key / height)
    )
    most = _most([point.quality.figure for point in points], unit)
    _draw_axes(axes, points, unit, narrow)
    for one in series:
        _draw_series(axes, one, most)
    above = [one for one in series if any(p.quality.figure > most for p in one.points)]
    for place, one in enumerate(above):
        _say_above(axes, one, most, place)
    axes.margins(x=0.08, y=0.1 + 0.03 * len(above))
    _draw_key(room, lines, width - corner[0], key)
    return figure


def _most(values: Sequence[float], unit: str) -> float:
    """The largest value that is drawn at its place; pictures that are all but equal stand above."""
    below = [value for value in values if value <= MOST_DB]
    if unit != "dB" or not below or len(below) == len(values):
        return max(values)
    return max(below) + max(0.12 * (max(below) - min(below)), 1.0)


def _draw_axes(axes: Axes, points: Sequence[Point], unit: str, narrow: bool) -> None:
    axes.spines["left"].set_visible(True)
    axes.grid(axis="both")
    axes.axvline(1.0, color=INK, linewidth=1.0)
    if not unit:
        axes.axhline(1.0, color=INK, linewidth=1.0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.tick_params(axis="y", labelcolor=MUTED, length=0)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("speed ratio, measured")
    metrics = sorted({point.quality.name.replace("psnr", "PSNR") for point in points})
    words = f"in {unit}" if unit else "kept"
    axes.set_ylabel(
        f"quality {words}" if narrow else f"{' or '.join(metrics)} {words}, measured; up is better"
    )


def _draw_series(axes: Axes, one: Series, most: float) -> None:
    """A line through the points of a series, each with its intervals and what sets it apart."""
    inside = [point for point in one.points if point.quality.figure <= most]
    axes.plot(
        [point.ratio for point in inside],
        [point.quality.figure for point in inside],
        color=one.colour,
        linewidth=1.9 if one.is_baseline else 1.6,
        linestyle=_dashes(one),
        zorder=2,
    )
    for point in one.points:
        beyond = point.quality.figure > most
        place = min(point.quality.figure, most)
        low, high = number(point.row, "ratio", "low"), number(point.row, "ratio", "high")
        thin: dict[str, Any] = {"color": one.colour, "linewidth": 1.0, "alpha": 0.45, "zorder": 1}
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], **thin)
        quality = point.quality
        if not beyond and quality.low is not None and quality.high is not None:
            axes.plot([point.ratio] * 2, [quality.low, min(quality.high, most)], **thin)
        axes.plot(
            [point.ratio],
            [place],
            marker="^" if beyond else _marker(one, point),
            color=one.colour,
            markerfacecolor=one.colour if point.is_faster else PAPER,
            markeredgecolor=PAPER if point.is_faster else one.colour,
            markersize=7.5,
            zorder=3,
        )
        if not beyond:
            _say(axes, one, point.ratio, place, one.label(point), -11 if one.is_baseline else 5)


def _say_above(axes: Axes, one: Series, most: float, line: int) -> None:
    """What is known of the points above the edge, in one line for each series that has some."""
    points = [point for point in one.points if point.quality.figure > most]
    words = [
        ": ".join(filter(None, (one.label(point), _nearness(point.quality.figure))))
        for point in points
    ]
    _say(axes, one, points[-1].ratio, most, ", ".join(words), 5 + 11 * line)


def _nearness(value: float) -> str:
    return "the same" if value >= SAME_DB else f"{value:.0f} dB"


def _say(axes: Axes, one: Series, x: float, y: float, words: str, up: float) -> None:
    axes.annotate(
        words,
        (x, y),
        xytext=(5, up),
        textcoords="offset points",
        fontsize=8,
        color=one.colour,
        zorder=4,
    )


def _marker(one: Series, point: Point) -> str:
    return "X" if text(point.row, "verdict") == "broken" else one.marker


def _dashes(one: Series) -> Any:
    return (0, (4, 2.5)) if one.is_baseline else "-"


def _key_lines(series: Sequence[Series], columns: int) -> Iterator[tuple[Series, list[str]]]:
    """Each series with the lines of its entry in the key."""
    for one in series:
        yield one, [*wrapped(one.name, columns).split("\n"), *filter(None, [one.remark])]


def _draw_key(
    axes: Axes, lines: Sequence[tuple[Series, list[str]]], width: float, height: float
) -> None:
    """The key, on axes whose unit is the inch."""
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    y = 0.75 * KEY_LINE
    for one, words in lines:
        axes.plot([0, SAMPLE], [y, y], color=one.colour, linewidth=1.8, linestyle=_dashes(one))
        axes.plot(
            [SAMPLE / 2],
            [y],
            one.marker,
            color=one.colour,
            markeredgecolor=PAPER,
            markersize=7,
            zorder=3,
        )
        for number_, line in enumerate(words):
            remark = bool(one.remark) and number_ == len(words) - 1
            axes.annotate(
                line,
                (SAMPLE + 0.12, y),
                va="center",
                fontsize=8 if remark else 9,
                color=MUTED if remark else INK,
            )
            y += KEY_LINE
        y += 0.75 * KEY_LINE
