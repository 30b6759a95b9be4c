"""Tables, sections and lists as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from hasten.measure.view import DASH


@dataclass(frozen=True)
class Column:
    """A column: its heading, how its numbers came about, and how it is set."""

    heading: str
    label: str | None = None
    numbers: bool = False
    whole: bool = False  # on a phone: a line of its own, without its heading


def table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of finished cells; on narrow screens each row becomes a card."""
    head = "".join(
        f"<th{_class('n' if c.numbers else '')}>{escape(c.heading)}{_pill_below(c.label)}</th>"
        for c in columns
    )
    lines = []
    for row in rows:
        cells = []
        for column, cell in zip(columns, row, strict=True):
            classes = " ".join(
                name
                for name, on in (
                    ("n", column.numbers),
                    ("whole", column.whole),
                    ("none", cell == DASH),
                )
                if on
            )
            label = column.heading + (f", {column.label}" if column.label else "")
            cells.append(
                f'<td{_class(classes)} data-label="{escape(label, quote=True)}">'
                f"<div>{cell}</div></td>"
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def section(heading: str, note: str, content: str) -> str:
    """A part of the page: heading, what it shows, and its content."""
    head = f'<h2>{escape(heading)}</h2><p class="note">{escape(note)}</p>'
    return f"<section>{head}{content}</section>"


def definitions(lines: Iterable[tuple[str, str]], *, escaped: bool = False) -> str:
    """A list of names and what they stand for."""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{words if escaped else escape(words)}</dd>"
        for name, words in lines
    )
    return f"<dl>{items}</dl>"


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _pill_below(label: str | None) -> str:
    return f'<br><span class="pill">{label}</span>' if label else ""


def small(words: str) -> str:
    """Small print below a figure."""
    return f'<span class="sub">{escape(words)}</span>'
