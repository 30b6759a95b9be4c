"""The top of the page: what was measured, what came of it, and the figures to see first."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from hasten.measure import view
from hasten.measure.view import DASH, MEASURED, MODELLED, number, text


def hero(result: Mapping[str, Any]) -> str:
    """What was measured and what came of it, with the figures to see first."""
    subject = view.look(result, "subject")
    about = [text(subject, key) for key in ("kind", "engine", "runner", "dtype")]
    parameters = number(subject, "parameters")
    if parameters is not None:
        about.append(f"{view.rate(parameters, '').strip()} parameters")
    eyebrow = " · ".join(word for word in about if word != DASH)
    sentence = headline(result).replace(" %", "\u00a0%")  # no line may start with the sign
    warning = ""
    if view.is_preliminary(result):
        warning = (
            '<p class="warning">Preliminary: fewer than five rounds were run. '
            "Do not quote these figures.</p>"
        )
    return (
        f'<header><p class="eyebrow">hasten bench{" · " if eyebrow else ""}{escape(eyebrow)}</p>'
        f"<h1>{escape(text(subject, 'name'))}</h1>"
        f'<p class="lead">{escape(sentence)}</p>{warning}{_tiles(result)}</header>'
    )


def headline(result: Mapping[str, Any]) -> str:
    """What came of it, in one sentence, with its uncertainty."""
    rows = view.rows(result)
    good = [
        row
        for row in rows
        if text(row, "verdict") == "faster"
        and view.look(row, "proof", "passed") is not False
        and number(row, "ratio", "median") is not None
    ]
    if not rows:
        return "No plan was measured."
    if not good:
        return "None of the plans measured here makes this model faster."
    best = max(good, key=lambda row: number(row, "ratio", "median") or 0.0)
    ratio, interval = view.times(number(best, "ratio", "median")), view.ratio_span(best)
    around = f"{view.coverage([best])} interval {interval}" if interval != DASH else "no interval"
    words = f"{view.plan_name(best)} runs at {ratio} the baseline's speed ({around})"
    passed = view.look(best, "proof", "passed")
    loss = text(best, "loss_class")
    if passed is True and loss == "exact":
        return f"{words}, and its output was the same, id for id, in every proof."
    if passed is True:
        return f"{words}, and the proof of its class, {loss}, passed."
    return f"{words}; its class, {loss}, was not proved."


def _tiles(result: Mapping[str, Any]) -> str:
    rows = view.rows(result)
    faster = sum(text(row, "verdict") == "faster" for row in rows)
    speed = view.output_rate(view.look(result, "baseline"))
    unit = view.RATES[view.rate_key(result)][1]
    proofs = [view.look(row, "proof", "passed") for row in rows]
    tiles = [
        (f"{faster} of {len(rows)}", f"plans faster, {MEASURED}"),
        (
            f"{sum(p is True for p in proofs)} of {len(rows)}",
            "classes proved" + (f", {proofs.count(False)} failed" if proofs.count(False) else ""),
        ),
        (
            view.plain_number(speed),
            f"baseline {unit}, {MEASURED} ({text(result, 'baseline', 'runner')})",
        ),
        (
            view.percent(number(result, "baseline", "limit_fraction")),
            f"of the machine's limit reached by the baseline, {MODELLED}",
        ),
    ]
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'
        for value, words in tiles
    )
    return f'<div class="tiles">{cells}</div>'
