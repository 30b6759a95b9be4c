"""The foot of the page: the machine's limits, and under what all was measured."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from hasten.measure import view
from hasten.measure.limits import MATRIX_TYPES
from hasten.measure.report.html import definitions, section
from hasten.measure.view import DASH, MEASURED, number, text


def limits(result: Mapping[str, Any]) -> str:
    """The machine's limits."""
    limits = view.look(result, "limits")
    if not isinstance(limits, Mapping) or not limits:
        return ""
    dispatch = number(limits, "dispatch_seconds")
    lines = [("read bandwidth, streaming", view.rate(number(limits, "bandwidth"), "B/s"))]
    cached = view.look(limits, "cached_bandwidth")
    for key in sorted(cached, key=_leading_number) if isinstance(cached, Mapping) else ():
        held = view.size(_leading_number(key))
        lines.append((f"{held} again and again", view.rate(number(cached, key), "B/s")))
    for name in MATRIX_TYPES:
        words = view.rate(number(limits, "matrix_rate", name), "op/s")
        if words == DASH:
            words = text(limits, "unsupported", name)
        lines.append((f"{name} matrix product", words))
    if dispatch is not None:
        lines.append(("one small call", f"{view.plain_number(1e6 * dispatch)} µs"))
    note = f"The best that was seen on this machine, {MEASURED}."
    other = number(limits, "other_load")
    if other is not None and other >= 0.3:
        note += f" Other work kept {other:.1f} cores busy meanwhile, so the true limits are higher."
    return section("Limits of the machine", note, definitions(lines))


def conditions(result: Mapping[str, Any]) -> str:
    """Under what all was measured."""
    lines = [
        (name, f"<code>{escape(words)}</code>" if name == "command" else escape(words))
        for name, words in view.conditions(result).lines
    ]
    digest = text(result, "subject", "hash")
    if digest != DASH:
        lines.append(("subject's hash", f"<code>{escape(digest)}</code>"))
    when = text(result, "created")
    if when != DASH:
        lines.append(("measured", escape(when)))
    note = "Under other conditions the figures are different. Run the command again to see."
    return section("Conditions", note, definitions(lines, escaped=True))


def _leading_number(key: Any) -> float:
    try:
        return float(key)
    except (TypeError, ValueError):
        return 0.0
