"""A bench result as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from hasten.home import atomic_write
from hasten.measure import curves, plots, view
from hasten.measure.limits import MATRIX_TYPES
from hasten.measure.pictures import Samples
from hasten.measure.style import CSS
from hasten.measure.view import CITED, DASH, MEASURED, MODELLED, number, text

_VERDICT_CLASSES = {"faster": "good", "no gain": "warn", "inactive": "odd", "broken": "bad"}
_KIND_CLASSES = {"additive": "good", "sub-additive": "warn", "broken": "bad", "refused": "muted"}

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
        _hero,
        _results,
        lambda _: _pictures(result, samples),
        _ratios,
        _speed,
        _quality_and_memory,
        _quality_table,
        _activity,
        _proofs,
        _claims,
        _pairs,
        _limits,
        _conditions,
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


def _pictures(result: Mapping[str, Any], samples: Samples | None) -> str:
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
    return _section("Pictures", note, samples.html(notes))


# ---- the top of the page


def _hero(result: Mapping[str, Any]) -> str:
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


# ---- tables


@dataclass(frozen=True)
class _Column:
    heading: str
    label: str | None = None
    numbers: bool = False
    whole: bool = False  # on a phone: a line of its own, without its heading


def _table(columns: Sequence[_Column], rows: Iterable[Sequence[str]]) -> str:
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


def _section(heading: str, note: str, content: str) -> str:
    head = f'<h2>{escape(heading)}</h2><p class="note">{escape(note)}</p>'
    return f"<section>{head}{content}</section>"


def _results(result: Mapping[str, Any]) -> str:
    rows = view.rows(result)
    labels = [
        label
        for label in (MODELLED, MEASURED)
        if any(
            view.ceiling_label(row) == label and number(row, "ceiling") is not None for row in rows
        )
    ] or [MODELLED]
    columns = [
        _Column("plan", whole=True),
        _Column("speed ratio", MEASURED, numbers=True),
        _Column(view.RATES[view.rate_key(result)][1], MEASURED, numbers=True),
        _Column("of limit", MODELLED, numbers=True),
        *(_Column("ceiling, reached", label, numbers=True) for label in labels),
        _Column("class"),
        _Column("quality kept", MEASURED, numbers=True),
        _Column("peak memory", MEASURED, numbers=True),
    ]
    blanks = [DASH] * len(labels)
    cells: list[list[str]] = []
    naive = view.look(result, "baseline", "naive")
    if isinstance(naive, Mapping):
        name = _plan(text(naive, "runner"), "", "", "the naive way")
        fraction = view.percent(view.limit_fraction(result, naive))
        speed = [_ratio(naive), _rate(naive), fraction]
        cells.append([name, *speed, *blanks, DASH, DASH, view.size(number(naive, "peak_bytes"))])
    baseline = view.look(result, "baseline")
    if isinstance(baseline, Mapping):
        name = _plan(text(baseline, "runner"), "", "", "baseline: the best plain setting")
        fraction = view.percent(number(baseline, "limit_fraction"))
        memory = view.size(number(baseline, "peak_bytes"))
        cells.append([name, DASH, _rate(baseline), fraction, *blanks, DASH, DASH, memory])
    for row in rows:
        verdict = text(row, "verdict")
        ceilings = [_ceiling(row) if view.ceiling_label(row) == label else DASH for label in labels]
        cells.append(
            [
                _plan(
                    view.plan_name(row),
                    verdict,
                    _VERDICT_CLASSES.get(verdict, ""),
                    text(row, "reason"),
                ),
                _ratio(row),
                _rate(row),
                view.percent(view.limit_fraction(result, row)),
                *ceilings,
                _loss_class(row),
                _kept(row),
                view.size(number(row, "peak_bytes")),
            ]
        )
    note = (
        "Baseline and plans took turns in one process. Ratios are compared round by round; small "
        f"print gives the {view.coverage(rows)} interval of the median ratio, the quartiles of "
        "the output rate, and the share of the possible saving of time that was reached (below zero: "
        "slower than before)."
    )
    return _section("Results", note, _table(columns, cells)) if cells else ""


def _quality_table(result: Mapping[str, Any]) -> str:
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
        _Column("plan", whole=True),
        _Column("metric"),
        _Column("value", MEASURED, numbers=True),
        _Column("original", MEASURED, numbers=True),
        _Column("kept", MEASURED, numbers=True),
        _Column("95 % interval", MEASURED, numbers=True),
        _Column("remarks"),
    ]
    note = (
        "Same prompts, same seeds, paired with the original. The interval is that of what is kept "
        "where there is such a figure, else of the value. 100 % is as good as the original."
    )
    return _section("Quality in full", note, _table(columns, cells))


def _activity(result: Mapping[str, Any]) -> str:
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
    columns = [_Column("plan", whole=True), _Column("activity", MEASURED)]
    return _section("Activity", note, _table(columns, cells))


def _proofs(result: Mapping[str, Any]) -> str:
    cells = [
        [
            f'<span class="plan">{escape(view.plan_name(row))}</span>',
            _loss_class(row),
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
    columns = [_Column("plan", whole=True), _Column("class"), _Column("what was tried", MEASURED)]
    return _section("Proofs", note, _table(columns, cells))


def _claims(result: Mapping[str, Any]) -> str:
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
                    _ratio(row) if view.is_speed_claim(claim) and not combined else DASH,
                ]
            )
    if not cells:
        return ""
    columns = [
        _Column("technique", whole=True),
        _Column("what"),
        _Column("the paper", CITED, numbers=True),
        _Column("where"),
        _Column("here, end to end", MEASURED, numbers=True),
    ]
    note = (
        "A paper's figure was taken on another model and another machine. It stands here for "
        "orientation and promises nothing about this one."
    )
    return _section("Claims beside measurements", note, _table(columns, cells))


# ---- plots


def _ratios(result: Mapping[str, Any]) -> str:
    svg = plots.ratio_plot(result)
    note = (
        f"Dot: median ratio. Thick line: its {view.coverage(view.objects(result, 'rows'))} "
        "interval. Grey: from no gain to the ceiling, the most that the technique can gain here."
    )
    return _section("Speed beside the ceiling", note, svg + _verdict_legend()) if svg else ""


def _speed(result: Mapping[str, Any]) -> str:
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
    return _section(f"{unit} beside the machine's limit", note, svg) if svg else ""


def _quality_and_memory(result: Mapping[str, Any]) -> str:
    sections = ""
    quality = curves.quality_plot(result)
    if quality:
        note = (
            "Up is better, right is faster. A line joins plans of the same techniques at other knobs; "
            "dashed ones are baselines, which a technique has to beat. Filled: faster beyond the noise. "
            "Hollow: no gain, or nothing done. Cross: broken. Triangle: nearer to the original than the "
            "axis reaches. Thin lines are intervals."
        )
        sections += _section("Quality against speed", note, quality)
    cache = plots.cache_plot(result)
    memory = plots.memory_plot(result) + cache
    if memory:
        note = "Most that the process held at any moment"
        note += ", and the KV cache by itself." if cache else "."
        sections += _section("Memory", note, memory)
    return sections


def _pairs(result: Mapping[str, Any]) -> str:
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
        _Column("pair", whole=True),
        _Column("first alone", MEASURED, numbers=True),
        _Column("second alone", MEASURED, numbers=True),
        _Column("both", MEASURED, numbers=True),
        _Column("kind"),
        _Column("reason"),
    ]
    note = "Speed ratios of two techniques at once. On the diagonal each one alone."
    return _section("Pairs", note, plots.pairs_plot(result) + _table(columns, cells))


def _verdict_legend() -> str:
    marks = "".join(
        f'<i style="background:var(--{name})"></i>{escape(verdict)}'
        for verdict, name in _VERDICT_CLASSES.items()
    )
    return f'<p class="legend">{marks}</p>'


# ---- the foot of the page


def _limits(result: Mapping[str, Any]) -> str:
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
    return _section("Limits of the machine", note, _definitions(lines))


def _conditions(result: Mapping[str, Any]) -> str:
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
    return _section("Conditions", note, _definitions(lines, escaped=True))


def _definitions(lines: Iterable[tuple[str, str]], *, escaped: bool = False) -> str:
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{words if escaped else escape(words)}</dd>"
        for name, words in lines
    )
    return f"<dl>{items}</dl>"


def _leading_number(key: Any) -> float:
    try:
        return float(key)
    except (TypeError, ValueError):
        return 0.0


# ---- cells


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _pill_below(label: str | None) -> str:
    return f'<br><span class="pill">{label}</span>' if label else ""


def _sub(words: str) -> str:
    return f'<span class="sub">{escape(words)}</span>'


def _plan(name: str, state: str, colour: str, reason: str = DASH) -> str:
    chip = f'<span class="chip {colour}">{escape(state)}</span>' if state else ""
    words = " · ".join(filter(None, (chip, escape(reason) if reason != DASH else "")))
    return f'<span class="plan">{escape(name)}</span><span class="sub">{words}</span>'


def _ratio(row: Any) -> str:
    middle = number(row, "ratio", "median")
    if middle is None:
        return DASH
    interval = view.ratio_span(row)
    words = "no interval" if interval == DASH else interval
    return f"<b>{view.times(middle)}</b>{_sub(words)}"


def _rate(row: Any) -> str:
    low, high = view.output_rate(row, "iqr", 0), view.output_rate(row, "iqr", 1)
    words = view.plain_number(view.output_rate(row))
    if low is None or high is None:
        return words
    return words + _sub(f"{view.plain_number(low)}{DASH}{view.plain_number(high)}")


def _ceiling(row: Any) -> str:
    value, reached = number(row, "ceiling"), number(row, "reached")
    if value is None:
        return DASH
    return view.times(value) + ("" if reached is None else _sub(view.percent(reached)))


def _loss_class(row: Any) -> str:
    passed = view.look(row, "proof", "passed")
    state, colour = "not proved", "muted"
    if passed is True:
        state, colour = "proved", "good"
    elif passed is False:
        state, colour = "proof failed", "bad"
    chip = f'<span class="sub"><span class="chip {colour}">{state}</span></span>'
    return f"{escape(text(row, 'loss_class'))}{chip}"


def _kept(row: Any) -> str:
    quality = view.main_quality(row)
    if quality is None:
        return DASH
    words = quality.words + (_sub(quality.interval) if quality.interval else "")
    return words + _sub(quality.name)
