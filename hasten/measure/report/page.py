"""A bench result as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hasten.home import atomic_write
from hasten.measure.pictures import Samples
from hasten.measure.report.figures import (
    pairs,
    pictures,
    quality_and_memory,
    ratios,
    speed,
)
from hasten.measure.report.foot import conditions, limits
from hasten.measure.report.head import hero
from hasten.measure.report.tables import activity, claims, proofs, quality_table, results
from hasten.measure.style import CSS
from hasten.measure.view import DASH, text

Part = Callable[[Mapping[str, Any]], str]


def write_report(
    result: Mapping[str, Any], path: str | os.PathLike[str], samples: Samples | None = None
) -> Path:
    """Write the report of a bench result (the object of `bench --json`) to an HTML file.

    `samples` are pictures that the plans made. The file appears whole or not at all. Pieces that the
    result lacks are left out or shown as a dash. Raises HastenError where matplotlib is missing or
    the place cannot be written.
    """
    return atomic_write(path, report_html(result, samples))


def report_html(result: Mapping[str, Any], samples: Samples | None = None) -> str:
    """The report as a string."""
    parts: Sequence[Part] = (
        hero,
        results,
        lambda _: pictures(result, samples),
        ratios,
        speed,
        quality_and_memory,
        quality_table,
        activity,
        proofs,
        claims,
        pairs,
        limits,
        conditions,
    )
    body = "\n".join(filter(None, (part(result) for part in parts)))
    title = escape(f"{text(result, 'subject', 'name')} {DASH} hasten bench")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
<footer>Every number says how it came about: <b>measured</b> here, <b>modelled</b> from measured
figures, or <b>cited</b> from a paper. Intervals hold for the noise of this run; another day or
machine may differ by more.</footer>
</main>
</body>
</html>
"""
