"""Results as rich tables for the terminal. Every column says how its numbers came about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from hasten.measure import view
from hasten.measure.ledger import Entry, stale_reasons
from hasten.measure.limits import MATRIX_TYPES, MIB, Limits
from hasten.measure.machine import OF_PIPELINES, machine, versions
from hasten.measure.view import CITED, DASH, MEASURED, MODELLED, number, text

_VERDICT_STYLES = {"faster": "green", "no gain": "yellow", "inactive": "magenta", "broken": "red"}


def bench_table(result: Mapping[str, Any]) -> Table:
    """A bench result (the object of `bench --json`): baselines first, then one line per plan.

    Fits in 80 columns. Ceilings that were measured get a column apart from modelled ones.
    """
    rows = view.rows(result)
    labels = _ceiling_labels(rows)
    title = f"{text(result, 'subject', 'name')}: speed beside the baseline, in turns"
    if view.is_preliminary(result):
        title += " (preliminary: fewer than five rounds)"
    table = _table(title, "\n".join([*_reasons(rows), view.conditions(result).sentence()]))
    crowded = len(labels) > 1  # one column more has to fit in 80
    if crowded:
        table.padding = 0
    table.add_column("plan", overflow="fold", min_width=8)
    _numbers(table, "speed\nratio", MEASURED)
    _numbers(table, view.RATES[view.rate_key(result)][1], MEASURED)
    _numbers(table, "of limit", MODELLED)
    for label in labels:
        _numbers(table, "ceiling,\nreached", label)
    _numbers(table, "class, proof,\nquality", MEASURED)
    _numbers(table, "memory", MEASURED)
    blanks = [DASH] * len(labels)
    naive = view.look(result, "baseline", "naive")
    if isinstance(naive, Mapping):
        table.add_row(
            _named(text(naive, "runner"), "the naive way"),
            _ratio(naive),
            _speed(naive),
            view.percent(view.limit_fraction(result, naive)),
            *blanks,
            DASH,
            view.size(number(naive, "peak_bytes")),
        )
    table.add_row(
        _named(text(result, "baseline", "runner"), "baseline"),
        DASH,
        _speed(view.look(result, "baseline")),
        view.percent(number(result, "baseline", "limit_fraction")),
        *blanks,
        DASH,
        view.size(number(result, "baseline", "peak_bytes")),
        end_section=True,
    )
    for row in rows:
        table.add_row(
            _plan(row),
            _ratio(row),
            _speed(row),
            view.percent(view.limit_fraction(result, row)),
            *(_ceiling(row) if view.ceiling_label(row) == label else DASH for label in labels),
            _proof(row).append("\n").append_text(_quality(row)),
            view.size(number(row, "peak_bytes")),
        )
    if not rows:
        table.add_row(Text("no plan was measured", style="dim"))
    return table


def _reasons(rows: Iterable[Any]) -> list[str]:
    """Why a plan is not simply faster, one line each; under the table there is room for it."""
    return [
        f"{view.plan_name(row)}: {text(row, 'verdict')}, {text(row, 'reason')}"
        for row in rows
        if text(row, "reason") != DASH
    ]


def _ceiling_labels(rows: Iterable[Any]) -> list[str]:
    used = {view.ceiling_label(row) for row in rows if number(row, "ceiling") is not None}
    return [label for label in (MODELLED, MEASURED) if label in used] or [MODELLED]


def pairs_table(result: Mapping[str, Any]) -> Table:
    """The pair matrix of a bench result, one line per pair."""
    table = _table("Techniques in pairs", None)
    table.add_column("pair", overflow="fold")
    for heading in ("first alone", "second alone", "both"):
        _numbers(table, heading, MEASURED)
    table.add_column("kind")
    table.add_column("reason", overflow="fold")
    styles = {"additive": "green", "sub-additive": "yellow", "broken": "red", "refused": "dim"}
    for pair in view.objects(result, "pairs"):
        kind = text(pair, "kind")
        table.add_row(
            Text(f"{text(pair, 'a')} + {text(pair, 'b')}"),
            *(view.times(number(pair, key)) for key in ("ratio_a", "ratio_b", "ratio_ab")),
            Text(kind, style=styles.get(kind, "")),
            Text(text(pair, "reason")),
        )
    return table


def limits_table(limits: Limits | Mapping[str, Any]) -> Table:
    """What the machine can do at best."""
    data = limits.to_dict() if isinstance(limits, Limits) else limits
    when = view.text(data, "measured_at")
    table = _table(f"Limits of {text(data, 'device')}", f"measured {when}")
    table.add_column("limit")
    _numbers(table, "best seen", MEASURED)
    table.add_column("note", overflow="fold")
    streamed = number(data, "streamed_bytes")
    table.add_row(
        "read bandwidth",
        view.rate(number(data, "bandwidth"), "B/s"),
        f"streaming {view.size(streamed)}",
    )
    cached = view.look(data, "cached_bandwidth")
    for key in sorted(cached, key=int) if isinstance(cached, Mapping) else ():
        table.add_row(
            f"read again and again, {int(key) // MIB} MiB",
            view.rate(number(cached, key), "B/s"),
            "a working set that caches may hold",
        )
    for name in MATRIX_TYPES:
        table.add_row(
            f"{name} matrix product",
            view.rate(number(data, "matrix_rate", name), "op/s"),
            Text(text(data, "unsupported", name).replace(DASH, "")),
        )
    dispatch = number(data, "dispatch_seconds")
    table.add_row(
        "one small call",
        f"{view.plain_number(dispatch * 1e6)} µs" if dispatch is not None else DASH,
        "cost of an operation that computes nothing",
    )
    other, threads = number(data, "other_load"), number(data, "threads")
    if other is not None and threads is not None and other > 0.15 * threads:
        table.caption = (
            f"measured {when} while other work kept {other:.1f} cores busy: the true limits are "
            "higher; measure again on a quiet machine with `hasten limits --refresh`"
        )
    return table


def ledger_table(entries: Iterable[Entry], cards: Mapping[str, Any] | None = None) -> Table:
    """Claims beside our measurements. Rows whose versions or machine have changed are dim.

    `cards` maps a technique's name to its card, whose `claims` have `what`, `value` and `where`.
    """
    table = _table("Measured here, beside what the papers claim", None)
    table.add_column("plan", overflow="fold", min_width=12)
    table.add_column("subject", overflow="fold", min_width=8)
    _numbers(table, "speed\nratio", MEASURED)
    _numbers(table, "class, proof,\nquality", MEASURED)
    claims = Text("claims", style="bold").append(f"\n{CITED}", style="dim italic")
    table.add_column(claims, overflow="fold", min_width=12)
    table.add_column("measured on", overflow="fold", min_width=10)
    here, now = machine().fingerprint, versions(*OF_PIPELINES)
    any_stale = False
    for entry in entries:
        reasons = stale_reasons(entry, now_versions=now, now_fingerprint=here)
        any_stale |= bool(reasons)
        when = entry.created[:10] + (f"\n{reasons[0]}" if reasons else "")
        if len(reasons) > 1:
            when += f", {len(reasons) - 1} more"
        cells = [
            _plan({**entry.row, "plan": entry.plan}),
            Text(entry.subject),
            _ratio(entry.row),
            _proof(entry.row).append("\n").append_text(_quality(entry.row)),
            Text("\n".join(_claims(entry.techniques, cards or {})) or DASH),
            Text(when),
        ]
        if reasons:
            # Colours would shine through a dim row and look valid.
            cells = [Text(cell.plain) for cell in cells]
        table.add_row(*cells, style="dim" if reasons else None)
    if table.row_count == 0:
        table.add_row(Text("nothing measured yet: run `hasten bench`", style="dim"))
    if any_stale:
        table.caption = "dim: measured under other versions or on another machine; run it again"
    return table


def _claims(techniques: Iterable[str], cards: Mapping[str, Any]) -> list[str]:
    names = [name for name in techniques if name in cards]
    lines = []
    for name in names:
        for claim in view.claim_field(cards[name], "claims") or ():
            prefix = f"{name}: " if len(names) > 1 else ""
            lines.append(prefix + view.claim_words(claim))
    return lines


def _table(title: str, caption: str | None) -> Table:
    # Text, not markup: a plan may hold square brackets.
    return Table(
        title=Text(title, style="bold"),
        caption=Text(caption, style="dim") if caption else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        border_style="dim",
    )


def _numbers(table: Table, heading: str, label: str) -> None:
    """A column of numbers, never cut short: a figure that lost its end is a wrong figure."""
    header = Text(heading, style="bold")
    header.append(f"\n{label}", style="dim italic")
    table.add_column(header, justify="right", no_wrap=True, overflow="fold")


def _named(name: str, remark: str) -> Text:
    return Text(name).append(f"\n{remark}", style="dim")


def _plan(row: Any) -> Text:
    words = Text(view.plan_name(row), style="bold")
    verdict = text(row, "verdict")
    style = f"not bold {_VERDICT_STYLES.get(verdict, '')}"
    return words.append(f"\n{verdict}", style=style.strip())


def _ceiling(row: Any) -> Text:
    words = Text(view.times(number(row, "ceiling")))
    reached = number(row, "reached")
    return words if reached is None else words.append(f"\n{view.percent(reached)}", style="dim")


def _ratio(row: Any) -> Text:
    low, high = number(row, "ratio", "low"), number(row, "ratio", "high")
    middle = number(row, "ratio", "median")
    style = ""
    if low is not None and high is not None:
        style = "green" if low > 1 else "red" if high < 1 else ""
    words = Text(view.times(middle), style=style)
    if middle is not None:
        # Without an interval the figure must not look certain.
        words.append(f"\n{view.ratio_span(row)}" if low and high else "\nno interval", style="dim")
    return words


def _speed(row: Any) -> Text:
    words = Text(view.plain_number(view.output_rate(row)))
    low, high = view.output_rate(row, "iqr", 0), view.output_rate(row, "iqr", 1)
    if low is not None and high is not None:
        words.append(f"\n{view.plain_number(low)}{DASH}{view.plain_number(high)}", style="dim")
    return words


def _proof(row: Any) -> Text:
    passed = view.look(row, "proof", "passed")
    words = Text(text(row, "loss_class"))
    if passed is True:
        words.append("\nproved", style="green")
    elif passed is False:
        words.append("\nproof failed", style="bold red")
    else:
        words.append("\nnot proved", style="dim")
    return words


def _quality(row: Any) -> Text:
    quality = view.main_quality(row)
    if quality is None:
        return Text(DASH)
    words = Text(f"{quality.name}\n", style="dim")
    words.append(quality.words, style="not dim")
    if quality.interval:
        words.append(f"\n{quality.interval}", style="dim")
    return words
