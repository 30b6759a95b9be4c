"""The tables of the page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from hasten.measure import view
from hasten.measure.report.cells import (
    ceiling_cell,
    class_cell,
    kept_cell,
    plan_cell,
    rate_cell,
    ratio_cell,
)
from hasten.measure.report.html import Column, section, table
from hasten.measure.view import CITED, DASH, MEASURED, MODELLED, number, text

VERDICT_CLASSES = {"faster": "good", "no gain": "warn", "inactive": "odd", "broken": "bad"}
"""The style of each verdict; one that is not listed has none."""


def results(result: Mapping[str, Any]) -> str:
    """Baseline and plans: speed, ceiling, class, quality and memory."""
    rows = view.rows(result)
    labels = [
        label
        for label in (MODELLED, MEASURED)
        if any(
            view.ceiling_label(row) == label and number(row, "ceiling") is not None for row in rows
        )
    ] or [MODELLED]
    columns = [
        Column("plan", whole=True),
        Column("speed ratio", MEASURED, numbers=True),
        Column(view.RATES[view.rate_key(result)][1], MEASURED, numbers=True),
        Column("of limit", MODELLED, numbers=True),
        *(Column("ceiling, reached", label, numbers=True) for label in labels),
        Column("class"),
        Column("quality kept", MEASURED, numbers=True),
        Column("peak memory", MEASURED, numbers=True),
    ]
    blanks = [DASH] * len(labels)
    cells: list[list[str]] = []
    naive = view.look(result, "baseline", "naive")
    if isinstance(naive, Mapping):
        name = plan_cell(text(naive, "runner"), "", "", "the naive way")
        fraction = view.percent(view.limit_fraction(result, naive))
        speed = [ratio_cell(naive), rate_cell(naive), fraction]
        cells.append([name, *speed, *blanks, DASH, DASH, view.size(number(naive, "peak_bytes"))])
    baseline = view.look(result, "baseline")
    if isinstance(baseline, Mapping):
        name = plan_cell(text(baseline, "runner"), "", "", "baseline: the best plain setting")
        fraction = view.percent(number(baseline, "limit_fraction"))
        memory = view.size(number(baseline, "peak_bytes"))
        cells.append([name, DASH, rate_cell(baseline), fraction, *blanks, DASH, DASH, memory])
    for row in rows:
        verdict = text(row, "verdict")
        ceilings = [
            ceiling_cell(row) if view.ceiling_label(row) == label else DASH for label in labels
        ]
        cells.append(
            [
                plan_cell(
                    view.plan_name(row),
                    verdict,
                    VERDICT_CLASSES.get(verdict, ""),
                    text(row, "reason"),
                ),
                ratio_cell(row),
                rate_cell(row),
                view.percent(view.limit_fraction(result, row)),
                *ceilings,
                class_cell(row),
                kept_cell(row),
                view.size(number(row, "peak_bytes")),
            ]
        )
    note = (
        "Baseline and plans took turns in one process. Ratios are compared round by round; small "
        f"print gives the {view.coverage(rows)} interval of the median ratio, the quartiles of "
        "the output rate, and the share of the possible saving of time that was reached (below zero: "
        "slower than before)."
    )
    return section("Results", note, table(columns, cells)) if cells else ""


def quality_table(result: Mapping[str, Any]) -> str:
    """Every quality figure."""
    cells = []
    for row in view.rows(result):
        for place, quality in enumerate(view.qualities(row)):
            interval = view.span(quality.low, quality.high, decimals=3)
            if quality.recovery is not None:
                interval = (
                    view.span(100 * quality.low, 100 * quality.high, decimals=1) + " %"
                    if quality.low is not None and quality.high is not None
                    else DASH
                )
            name = escape(view.plan_name(row))
            cells.append(
                [
                    f'<span class="{"plan" if place == 0 else "muted"}">{name}</span>',
                    escape(quality.name),
                    view.plain_number(quality.value),
                    view.plain_number(quality.original),
                    view.recovery_words(quality.recovery),
                    interval,
                    escape(quality.remarks) or DASH,
                ]
            )
    if not cells:
        return ""
    columns = [
        Column("plan", whole=True),
        Column("metric"),
        Column("value", MEASURED, numbers=True),
        Column("original", MEASURED, numbers=True),
        Column("kept", MEASURED, numbers=True),
        Column("95 % interval", MEASURED, numbers=True),
        Column("remarks"),
    ]
    note = (
        "Same prompts, same seeds, paired with the original. The interval is that of what is kept "
        "where there is such a figure, else of the value. 100 % is as good as the original."
    )
    return section("Quality in full", note, table(columns, cells))


def activity(result: Mapping[str, Any]) -> str:
    """The counters of each plan."""
    cells = []
    for row in view.rows(result):
        counters = view.look(row, "activity")
        words = DASH
        if isinstance(counters, Mapping) and counters:
            words = "".join(
                f'<span><span class="muted">{escape(str(name).replace("_", " "))}</span> '
                f"<b>{escape(text(counters, name))}</b></span>"
                for name in counters
            )
            words = f'<div class="counters">{words}</div>'
        cells.append([f'<span class="plan">{escape(view.plan_name(row))}</span>', words])
    if not cells:
        return ""
    note = "Counters by which each technique shows that it did something. All zero means inactive."
    columns = [Column("plan", whole=True), Column("activity", MEASURED)]
    return section("Activity", note, table(columns, cells))


def proofs(result: Mapping[str, Any]) -> str:
    """How each class was tried."""
    cells = [
        [
            f'<span class="plan">{escape(view.plan_name(row))}</span>',
            class_cell(row),
            escape(text(row, "proof", "detail")),
        ]
        for row in view.rows(result)
    ]
    if not cells:
        return ""
    note = (
        "Each technique states a class: exact (same ids), distribution (same sampling "
        "distribution) or lossy (a stated share of the quality is kept). Here it was tried."
    )
    columns = [Column("plan", whole=True), Column("class"), Column("what was tried", MEASURED)]
    return section("Proofs", note, table(columns, cells))


def claims(result: Mapping[str, Any]) -> str:
    """Papers' figures beside ours."""
    cells, seen = [], set()
    for row in view.rows(result):
        claims = view.objects(row, "claims")
        # The ratio of a whole plan says nothing about the claim of one of its techniques.
        combined = len({text(claim, "technique") for claim in claims}) > 1
        for claim in claims:
            fields = tuple(text(claim, key) for key in ("technique", "what", "value", "where"))
            if combined and fields in seen:
                continue
            seen.add(fields)
            name = text(claim, "technique") if combined else view.plan_name(row)
            cells.append(
                [
                    f'<span class="plan">{escape(name)}</span>',
                    escape(text(claim, "what")),
                    escape(view.claimed(claim)),
                    escape(text(claim, "where")),
                    ratio_cell(row) if view.is_speed_claim(claim) and not combined else DASH,
                ]
            )
    if not cells:
        return ""
    columns = [
        Column("technique", whole=True),
        Column("what"),
        Column("the paper", CITED, numbers=True),
        Column("where"),
        Column("here, end to end", MEASURED, numbers=True),
    ]
    note = (
        "A paper's figure was taken on another model and another machine. It stands here for "
        "orientation and promises nothing about this one."
    )
    return section("Claims beside measurements", note, table(columns, cells))
