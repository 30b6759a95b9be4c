"""Generated documentation: a page per technique, and the results table of the README.

    python -m hasten.docs cards [FOLDER]     write docs/cards (--check: only say what is out of date)
    python -m hasten.docs results [FILE]     fill a model's results in README.md from the ledger

Pages hold what a technique declares, so they change only when its source does. Figures come from
the ledger and nowhere else.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hasten import technique as registry
from hasten.errors import HastenError
from hasten.home import atomic_write
from hasten.plan import conflict
from hasten.technique import Technique

FOLDER = Path("docs/cards")
INDEX = "README.md"


def block(subject: str) -> tuple[str, str]:
    """The comments between which the results of a model stand in a Markdown file."""
    how = f"written by `python -m hasten.docs results --subject {subject}`"
    return f"<!-- results of {subject}: begin; {how} -->", f"<!-- results of {subject}: end -->"


def card_data(kind: type[Technique]) -> dict[str, Any]:
    """A technique's card, contract and knobs as data; what `hasten show --json` prints."""
    card, contract = kind.card, kind.contract
    return {
        "name": kind.name,
        "title": card.title,
        "summary": inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].replace("\n", " "),
        "family": card.family,
        "baseline": card.is_baseline,
        "paper": card.paper,
        "link": card.link,
        "year": card.year or None,
        "loss_class": card.loss.value,
        "slots": [f"{slot.engine}.{slot.label}" for slot in contract.slots],
        "phase": contract.phase.value,
        "runners": sorted(contract.runners),
        "reads": sorted(resource.value for resource in contract.reads),
        "changes": sorted(resource.value for resource in contract.changes),
        "needs": sorted(resource.value for resource in contract.needs),
        "trained": card.trained,
        "saves": card.saves,
        "neutral": dict(card.neutral) if card.neutral is not None else None,
        "rival": dataclasses.asdict(card.rival) if card.rival else None,
        "knobs": _knobs(kind),
        "claims": [dataclasses.asdict(claim) for claim in card.claims],
        "notes": card.notes,
    }


def _knobs(kind: type[Technique]) -> list[dict[str, Any]]:
    hints = typing.get_type_hints(kind)
    knobs = []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        limits = field.metadata.get("knob") or registry.Knob("")
        knobs.append(
            {
                "name": field.name,
                "type": _type_words(hints[field.name]),
                "default": field.default,
                "low": limits.low,
                "high": limits.high,
                "choices": list(limits.choices),
                "help": limits.help,
            }
        )
    return knobs


def _type_words(hint: Any) -> str:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(
        "none" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options
    )


def knob_limits(knob: dict[str, Any]) -> str:
    """The allowed values of a knob in words; empty where all of its type are."""
    if knob["choices"]:
        return ", ".join(repr(choice) for choice in knob["choices"])
    low, high = knob["low"], knob["high"]
    if low is None and high is None:
        return ""
    if high is None:
        return f"{low:g} or more"
    return f"up to {high:g}" if low is None else f"{low:g} to {high:g}"


# -- cards -----------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """All card pages by file name: one for each technique that ships with hasten, and the index."""
    kinds = [registry.get(name) for name in sorted(registry.BUILT_IN)]
    return {INDEX: _index(kinds)} | {f"{kind.name}.md": _page(kind, kinds) for kind in kinds}


def stale(folder: Path = FOLDER) -> list[str]:
    """Names of pages in a folder that are missing, out of date or left over."""
    wanted = pages()
    found = {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")}
    return sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )


def write(folder: Path = FOLDER) -> list[str]:
    """Bring a folder of pages up to date; returns the names that changed."""
    changed = stale(folder)
    wanted = pages()
    for name in changed:
        if name in wanted:
            atomic_write(folder / name, wanted[name])
        else:
            (folder / name).unlink()
    return changed


def _index(kinds: Iterable[type[Technique]]) -> str:
    rows = []
    for kind in kinds:
        card = kind.card
        slots = ", ".join(slot.label for slot in kind.contract.slots)
        what = card.title + (" (baseline)" if card.is_baseline else f" ({card.year})")
        rows.append([f"[{kind.name}]({kind.name}.md)", card.family, slots, card.loss.value, what])
    table = _table(["technique", "family", "slot", "class", "what it is"], rows)
    return _lines(
        "# Technique cards",
        "One page for each technique that ships with hasten, written from its source by "
        "`python -m hasten.docs cards`. `hasten list` and `hasten show NAME` print the same.",
        "A baseline is a plain rival that the papers' methods must beat; no paper of the list is about it.",
        table,
    )


def _page(kind: type[Technique], others: Sequence[type[Technique]]) -> str:
    data = card_data(kind)
    source = data["link"] and f"<{data['link']}>"
    paper = f"`{data['paper']}`, {data['year']}" if data["paper"] else "none: a plain baseline"
    facts = [
        ("paper", ", ".join(filter(None, (paper, source)))),
        ("family", data["family"]),
        ("slot", ", ".join(data["slots"])),
        ("loss class", data["loss_class"]),
        ("saves", data["saves"].replace("_", " ")),
        ("runners", ", ".join(data["runners"])),
        ("reads", "; ".join(data["reads"])),
        ("changes", "; ".join(data["changes"])),
        ("needs", "; ".join(data["needs"])),
        ("neutral at", ", ".join(f"`{k}={v!r}`" for k, v in (data["neutral"] or {}).items())),
        ("trained", f"yes: `hasten prepare MODEL --with {kind.name}`" if data["trained"] else "no"),
    ]
    parts = [f"# {kind.name}", f"**{data['title']}**", inspect.cleandoc(kind.__doc__ or "")]
    parts.append(_table(["", ""], [[name, _cell(value)] for name, value in facts if value]))
    if data["knobs"]:
        rows = [
            [f"`{k['name']}`", k["type"], f"`{k['default']!r}`", knob_limits(k), _cell(k["help"])]
            for k in data["knobs"]
        ]
        parts += ["## Knobs", _table(["knob", "type", "default", "allowed", "consequence"], rows)]
    if data["claims"]:
        claims = [[_cell(c["what"]), f"{c['value']:g}", _cell(c["where"])] for c in data["claims"]]
        parts += [
            "## What the paper claims",
            "Cited, not measured here; `hasten ledger` shows both side by side.",
        ]
        parts.append(_table(["what", "value", "where"], claims))
    if data["rival"]:
        rival = data["rival"]
        parts += ["## What it must beat", f"`{rival['plan']}` in {rival['metric']}: {rival['why']}"]
    clashes = _clashes(kind, others)
    if clashes:
        parts += ["## What it cannot stand beside", "\n".join(f"- {words}" for words in clashes)]
    if data["notes"]:
        parts += ["## Notes", data["notes"]]
    return _lines(*parts)


def _clashes(kind: type[Technique], others: Iterable[type[Technique]]) -> list[str]:
    """Conflicts with other techniques, from the contracts; grouped by what they clash on."""
    mine = kind()
    by_slot: dict[str, list[str]] = {}
    rest = []
    for other in others:
        words = conflict(mine, other()) if other is not kind else None
        if words is None:
            continue
        shared = [s for s in kind.contract.slots if s.exclusive and s in other.contract.slots]
        if shared:
            by_slot.setdefault(shared[0].label, []).append(other.name)
        else:
            rest.append(words.partition(";")[0] + ".")
    slots = [
        f"The slot `{label}` takes one technique: {', '.join(names)}."
        for label, names in by_slot.items()
    ]
    return slots + rest


def _cell(value: str) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _lines(*parts: str) -> str:
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


# -- results ---------------------------------------------------------------------------------------


def results(subject: str = "code-lm") -> str:
    """The newest measurement of each plan on one model, as a Markdown table.

    Raises:
        HastenError: where the ledger holds nothing that was measured here under these versions.
    """
    from hasten.measure import view
    from hasten.measure.ledger import Entry, Ledger, is_stale

    present = [entry for entry in Ledger().entries(subject=subject) if not is_stale(entry)]
    # A model that was trained anew under its old name is another one.
    newest: dict[str, Entry] = {
        entry.plan: entry for entry in present if entry.subject_hash == present[-1].subject_hash
    }
    if not newest:
        raise HastenError(
            f"the ledger holds no present measurement of {subject}; run `hasten bench {subject} --with ...`"
        )
    rows = []
    for plan, entry in sorted(newest.items()):
        row = entry.row
        quality = view.main_quality(row)
        kept = f"{quality.name} {quality.words}" if quality else view.DASH
        proof = {True: "proved", False: "proof failed"}.get(
            view.look(row, "proof", "passed"), "not proved"
        )
        rows.append(
            [
                f"`{plan}`",
                f"{view.times(view.number(row, 'ratio', 'median'))} ({view.ratio_span(row)})",
                view.times(view.number(row, "ceiling")),
                f"{view.text(row, 'loss_class')}, {proof}",
                kept,
                _cell(view.text(row, "verdict")),
                _cell("; ".join(_speed_claims(entry.techniques)) or view.DASH),
            ]
        )
    head = [
        "plan",
        "speed ratio (measured)",
        "ceiling (modelled)",
        "class",
        "quality kept (measured)",
        "verdict",
        "the paper's claim (cited)",
    ]
    return _lines(_table(head, rows), _conditions(newest.values()))


def _speed_claims(names: Iterable[str]) -> list[str]:
    from hasten.measure import view

    names = list(names)
    if len(names) > 1:
        return []
    claims = [claim for name in names for claim in registry.get(name).card.claims]
    return [view.claim_words(claim) for claim in claims if view.is_speed_claim(claim)][:1]


def _conditions(entries: Iterable[Any]) -> str:
    """Under what the figures were measured, once."""
    from hasten.measure.machine import OF_PIPELINES, machine, versions
    from hasten.measure.view import machine_words

    entries = list(entries)
    days = sorted({entry.created[:10] for entry in entries})
    threads = sorted({entry.threads for entry in entries})
    further = {name for entry in entries for name in entry.versions}.intersection(OF_PIPELINES)
    now = versions(*sorted(further))  # those of the entries too, since none of them is stale
    stamped = ", ".join(f"{name} {version}" for name, version in now.items())
    return (
        f"Measured on {', '.join(days)}: {machine_words(machine().to_dict())}; "
        f"{', '.join(map(str, threads))} thread(s); {stamped}. A ratio stands beside the plain model run in turns "
        "with it, with the interval of the median; a ceiling is the most that the technique can gain here."
    )


def fill(file: Path, table: str, subject: str) -> bool:
    """Put a table into a model's block of a Markdown file; says whether the file changed."""
    text = file.read_text(encoding="utf-8")
    first, last = block(subject)
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise HastenError(
            f"{file} has no block of results of {subject}; put {first} and {last} where the table belongs"
        )
    new = f"{before}{first}\n\n{table.strip()}\n\n{last}{after}"
    if new != text:
        atomic_write(file, new)
    return new != text


def main(arguments: Sequence[str] | None = None) -> int:
    """The generator's own small command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hasten.docs", description="Write generated documentation."
    )
    parser.add_argument("what", choices=("cards", "results"))
    parser.add_argument(
        "where", nargs="?", type=Path, help="folder of the cards, or the file with the table"
    )
    parser.add_argument(
        "--check", action="store_true", help="write no card; exit 1 where one is out of date"
    )
    parser.add_argument("--subject", default="code-lm", help="model of the results table")
    given = parser.parse_args(arguments)
    try:
        if given.what == "results":
            file = given.where or Path("README.md")
            changed = fill(file, results(given.subject), given.subject)
            print(f"{file}: {'changed' if changed else 'up to date'}")
            return 0
        folder = given.where or FOLDER
        names = stale(folder) if given.check else write(folder)
    except HastenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in names:
        print(f"{folder / name}: {'out of date' if given.check else 'written'}")
    return 1 if given.check and names else 0


if __name__ == "__main__":
    raise SystemExit(main())
