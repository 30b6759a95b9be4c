"""A plan: an ordered list of techniques with their knobs. Data, never code."""

from __future__ import annotations

import ast
import dataclasses
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from hasten import technique as registry
from hasten.errors import PlanError
from hasten.technique import Phase, Technique

FORM = 'A plan is written "name, name(knob=value, ...)".'


@dataclass(frozen=True)
class Entry:
    """One technique of a plan with the knobs that were written down (the others are defaults)."""

    technique: Technique
    written: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.written:
            return self.technique.name
        knobs = ", ".join(f"{name}={_literal(self.technique.knobs[name])}" for name in self.written)
        return f"{self.technique.name}({knobs})"

    @classmethod
    def make(cls, name: str, knobs: dict[str, Any]) -> Entry:
        """Look a technique up and set its knobs, each checked."""
        kind = registry.get(name)
        known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for knob in knobs:
            if knob not in known:
                allowed = ", ".join(known) if known else "none"
                raise PlanError(f"{name} has no knob {knob!r}; its knobs are: {allowed}.")
        return cls(kind(**knobs), tuple(knobs))


@dataclass(frozen=True)
class Plan:
    """Techniques in the order in which they were written; `ordered()` is the order of work."""

    entries: tuple[Entry, ...] = ()

    # -- text ----------------------------------------------------------------------------------
    @classmethod
    def parse(cls, *texts: str | Plan | Technique) -> Plan:
        """Read `"name, name(knob=value)"`; several texts are joined, plans and techniques too."""
        entries: list[Entry] = []
        for text in texts:
            if isinstance(text, Plan):
                entries += text.entries
            elif isinstance(text, Technique):
                defaults = type(text)().knobs
                written = tuple(k for k, v in text.knobs.items() if v != defaults[k])
                entries.append(Entry(text, written))
            elif isinstance(text, str):
                entries += _parse(text)
            else:
                raise PlanError(f"{text!r} is a {type(text).__name__}, not a plan. {FORM}")
        plan = cls(tuple(entries))
        plan.check()
        return plan

    def __str__(self) -> str:
        return ", ".join(map(str, self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Technique]:
        return (entry.technique for entry in self.entries)

    # -- TOML ----------------------------------------------------------------------------------
    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Read `[[technique]]` tables, each with a name and its knobs."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"The plan is not valid TOML: {error}.") from error
        tables = data.pop("technique", None)
        if data or not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise PlanError(
                "A plan file holds [[technique]] tables only, each with a name and knobs."
            )
        entries = []
        for table in tables:
            knobs = dict(table)
            name = knobs.pop("name", None)
            if not isinstance(name, str):
                raise PlanError('Each [[technique]] table needs a name, such as name = "medusa".')
            entries.append(Entry.make(name, knobs))
        plan = cls(tuple(entries))
        plan.check()
        return plan

    def to_toml(self) -> str:
        """The plan as TOML, which `from_toml` reads back to the same plan."""
        tables = []
        for entry in self.entries:
            lines = ["[[technique]]", f'name = "{entry.technique.name}"']
            lines += [f"{k} = {_toml(entry.technique.knobs[k])}" for k in entry.written]
            tables.append("\n".join(lines) + "\n")
        return "\n".join(tables)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file."""
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"Cannot read the plan file {path}: {error}.") from error

    # -- order and legality ----------------------------------------------------------------------
    def ordered(self) -> list[Technique]:
        """The order in which the techniques act: by phase, then as written."""
        phases = list(Phase)
        return sorted(self, key=lambda technique: phases.index(technique.contract.phase))

    def check(self) -> None:
        """Raise one clear error for a plan in which two techniques clash."""
        for first, second in combinations(self, 2):
            clash = conflict(first, second)
            if clash:
                raise PlanError(clash)
        engines = {slot.engine for technique in self for slot in technique.contract.slots}
        if len(engines) > 1:
            raise PlanError(
                f"A plan runs on one engine; this one names {', '.join(sorted(engines))}."
            )


def conflict(first: Technique, second: Technique) -> str | None:
    """Why two techniques cannot stand in one plan, from their contracts; None if they can."""
    if first.name == second.name:
        return f"{first.name} stands in the plan twice; name it once."
    ours, theirs = first.terms(), second.terms()
    for slot in ours.slots:
        if slot.exclusive and slot in theirs.slots:
            return (
                f"{first.name} and {second.name} both fill the slot {slot.label!r}, which takes one "
                "technique; leave one of them out."
            )
    for needing, changing in ((first, second), (second, first)):
        clash = needing.terms().needs & changing.terms().changes
        if clash:
            resource = min(clash, key=lambda r: r.name)
            return (
                f"{needing.name} needs {resource.value}, which {changing.name} changes; "
                "leave one of them out."
            )
    return None


def legal_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """All pairs of the named techniques, at their defaults, that may stand in one plan."""
    made = [registry.get(name)() for name in names]
    return [(a.name, b.name) for a, b in combinations(made, 2) if conflict(a, b) is None]


def _parse(text: str) -> list[Entry]:
    if not text.strip():
        return []
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise PlanError(f"Cannot read the plan {text!r}. {FORM}") from error
    return [_entry(node, text) for node in (tree.elts if isinstance(tree, ast.Tuple) else [tree])]


def _entry(node: ast.expr, text: str) -> Entry:
    if isinstance(node, ast.Name):
        return Entry.make(node.id, {})
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.args:
        raise PlanError(f"Cannot read the plan {text!r}. {FORM}")
    knobs: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise PlanError(f"Cannot read the plan {text!r}. {FORM}")
        try:
            knobs[keyword.arg] = ast.literal_eval(keyword.value)
        except ValueError as error:
            if not isinstance(keyword.value, ast.Name):
                message = f"{node.func.id}: the value of {keyword.arg!r} is not a number, a text, True, False or None."
                raise PlanError(message) from error
            knobs[keyword.arg] = _bare(keyword.value.id)
    return Entry.make(node.func.id, knobs)


def _bare(word: str) -> Any:
    """A word without quotes: `true`, `inf` and the like, else a text."""
    return {"true": True, "false": False, "none": None, "inf": float("inf")}.get(word, word)


def _literal(value: Any) -> str:
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "inf" if value > 0 else "-inf"
    return repr(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value)
