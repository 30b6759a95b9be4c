"""The plots of the page, and the pictures that plans made, each with what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from hasten.measure import curves, plots, view
from hasten.measure.pictures import Samples
from hasten.measure.report.html import Column, section, table
from hasten.measure.report.tables import VERDICT_CLASSES
from hasten.measure.view import DASH, MEASURED, number, text

_KIND_CLASSES = {"additive": "good", "sub-additive": "warn", "broken": "bad", "refused": "muted"}


def pictures(result: Mapping[str, Any], samples: Samples | None) -> str:
    """What each plan made of the same noise; empty where no pictures were made."""
    if samples is None:
        return ""
    notes = {}
    for row in view.rows(result):
        quality = view.main_quality(row)
        words = [view.times(number(row, "ratio", "median")), quality.words if quality else ""]
        notes[view.plan_name(row)] = ", ".join(word for word in words if word not in ("", DASH))
    note = (
        "What each plan makes of the same noise; the first row is the model as it is. Beside it the "
        f"speed ratio and the likeness to that row over all compared pictures, {MEASURED}."
    )
    return section("Pictures", note, samples.html(notes))


def ratios(result: Mapping[str, Any]) -> str:
    """Speed ratios beside ceilings."""
    svg = plots.ratio_plot(result)
    note = (
        f"Dot: median ratio. Thick line: its {view.coverage(view.objects(result, 'rows'))} "
        "interval. Grey: from no gain to the ceiling, the most that the technique can gain here."
    )
    return section("Speed beside the ceiling", note, svg + _verdict_legend()) if svg else ""


def speed(result: Mapping[str, Any]) -> str:
    """The output rate beside the machine's limit."""
    svg = plots.throughput_plot(result)
    note = "Bars: median with quartiles. "
    if view.rate_key(result) == "tokens_per_second":
        note += (
            "The limit is that of plain decoding, one token per pass with the model's bytes at the "
            "measured bandwidth; plans that need fewer passes or bytes may cross it."
        )
    else:
        note += (
            "The limit is that of the plain sampler's operations at the measured rate of arithmetic; "
            "plans that need fewer operations may cross it."
        )
    unit = view.RATES[view.rate_key(result)][0].capitalize()
    return section(f"{unit} beside the machine's limit", note, svg) if svg else ""


def quality_and_memory(result: Mapping[str, Any]) -> str:
    """Quality against speed, and memory."""
    sections = ""
    quality = curves.quality_plot(result)
    if quality:
        note = (
            "Up is better, right is faster. A line joins plans of the same techniques at other knobs; "
            "dashed ones are baselines, which a technique has to beat. Filled: faster beyond the noise. "
            "Hollow: no gain, or nothing done. Cross: broken. Triangle: nearer to the original than the "
            "axis reaches. Thin lines are intervals."
        )
        sections += section("Quality against speed", note, quality)
    cache = plots.cache_plot(result)
    memory = plots.memory_plot(result) + cache
    if memory:
        note = "Most that the process held at any moment"
        note += ", and the KV cache by itself." if cache else "."
        sections += section("Memory", note, memory)
    return sections


def pairs(result: Mapping[str, Any]) -> str:
    """Techniques in pairs, as a matrix and as a table."""
    pairs = view.objects(result, "pairs")
    if not pairs:
        return ""
    cells = []
    for pair in pairs:
        kind = text(pair, "kind")
        cells.append(
            [
                f'<span class="plan">{escape(text(pair, "a"))} + {escape(text(pair, "b"))}</span>',
                *(view.times(number(pair, key)) for key in ("ratio_a", "ratio_b", "ratio_ab")),
                f'<span class="chip {_KIND_CLASSES.get(kind, "")}">{escape(kind)}</span>',
                escape(text(pair, "reason")),
            ]
        )
    columns = [
        Column("pair", whole=True),
        Column("first alone", MEASURED, numbers=True),
        Column("second alone", MEASURED, numbers=True),
        Column("both", MEASURED, numbers=True),
        Column("kind"),
        Column("reason"),
    ]
    note = "Speed ratios of two techniques at once. On the diagonal each one alone."
    return section("Pairs", note, plots.pairs_plot(result) + table(columns, cells))


def _verdict_legend() -> str:
    marks = "".join(
        f'<i style="background:var(--{name})"></i>{escape(verdict)}'
        for verdict, name in VERDICT_CLASSES.items()
    )
    return f'<p class="legend">{marks}</p>'
