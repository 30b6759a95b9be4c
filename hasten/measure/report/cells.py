"""What stands in a cell: a plan, a ratio, a rate, a ceiling, a class, a quality."""

from __future__ import annotations

from html import escape
from typing import Any

from hasten.measure import view
from hasten.measure.report.html import small
from hasten.measure.view import DASH, number, text


def plan_cell(name: str, state: str, colour: str, reason: str = DASH) -> str:
    """A plan's name, with what became of it."""
    chip = f'<span class="chip {colour}">{escape(state)}</span>' if state else ""
    words = " · ".join(filter(None, (chip, escape(reason) if reason != DASH else "")))
    return f'<span class="plan">{escape(name)}</span><span class="sub">{words}</span>'


def ratio_cell(row: Any) -> str:
    """The speed ratio with its interval."""
    middle = number(row, "ratio", "median")
    if middle is None:
        return DASH
    interval = view.ratio_span(row)
    words = "no interval" if interval == DASH else interval
    return f"<b>{view.times(middle)}</b>{small(words)}"


def rate_cell(row: Any) -> str:
    """The output rate with its quartiles."""
    low, high = view.output_rate(row, "iqr", 0), view.output_rate(row, "iqr", 1)
    words = view.plain_number(view.output_rate(row))
    if low is None or high is None:
        return words
    return words + small(f"{view.plain_number(low)}{DASH}{view.plain_number(high)}")


def ceiling_cell(row: Any) -> str:
    """The ceiling with the share of it that was reached."""
    value, reached = number(row, "ceiling"), number(row, "reached")
    if value is None:
        return DASH
    return view.times(value) + ("" if reached is None else small(view.percent(reached)))


def class_cell(row: Any) -> str:
    """The loss class, and whether it was proved."""
    passed = view.look(row, "proof", "passed")
    state, colour = "not proved", "muted"
    if passed is True:
        state, colour = "proved", "good"
    elif passed is False:
        state, colour = "proof failed", "bad"
    chip = f'<span class="sub"><span class="chip {colour}">{state}</span></span>'
    return f"{escape(text(row, 'loss_class'))}{chip}"


def kept_cell(row: Any) -> str:
    """What of the quality is kept."""
    quality = view.main_quality(row)
    if quality is None:
        return DASH
    words = quality.words + (small(quality.interval) if quality.interval else "")
    return words + small(quality.name)
