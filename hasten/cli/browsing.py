"""`list` and `show`: what there is, and what each thing says of itself."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from hasten.cli.shared import AsJson, console, note, only_json, print_json, quiet_libraries, verb
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.technique import Technique


@verb(
    "hasten list",
    "hasten list '*cache*'",
    "hasten list --family kv_cache --json",
    name="list",
)
def list_techniques(
    pattern: Annotated[str, typer.Argument(help="A name or a wildcard, such as '*kv*'.")] = "*",
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    engine: Annotated[str | None, typer.Option(help="Only this engine, such as causal.")] = None,
    as_json: AsJson = False,
) -> None:
    """List techniques and zoo models."""
    import hasten.zoo.catalogue as zoo

    with only_json(as_json):
        from hasten import technique as registry
        from hasten.docs import card_data

        kinds = _importable(registry.names(pattern))
        if family is not None or engine is not None:
            every = kinds if pattern == "*" else _importable(registry.names())
            _one_of("family", family, {kind.card.family for kind in every})
            _one_of(
                "engine", engine, {slot.engine for kind in every for slot in kind.contract.slots}
            )
        if family is not None:
            kinds = [kind for kind in kinds if kind.card.family == family]
        if engine is not None:
            kinds = [kind for kind in kinds if any(s.engine == engine for s in kind.contract.slots)]
    if as_json:
        print_json({"techniques": [card_data(kind) for kind in kinds], "models": zoo.names()})
        return
    if kinds:
        console().print(_techniques_table(kinds))
    else:
        print("No technique matches; `hasten list` shows all of them.")
    if pattern == "*" and family is None and engine is None:
        models = ", ".join(zoo.names()) or "none; `hasten train` makes them"
        console().print(f"Zoo models: {models}", highlight=False, markup=False)


@verb(
    "hasten show medusa",
    "hasten show code-lm",
    "hasten show prefix_kv --json",
)
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A technique, or a model as `bench` takes it.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show a technique's card and knobs, or what a model is and which slots it offers."""
    with only_json(as_json):
        import hasten.zoo.catalogue as zoo
        from hasten import technique as registry
        from hasten.docs import card_data

        if name in registry.names():
            data = card_data(registry.get(name))
            words = _card_words
        elif zoo.is_zoo_name(name) or "/" in name or Path(name).exists():
            data = _model_data(name, as_json)
            words = _model_words
        else:
            raise HastenError(_unknown(name, [*registry.names(), *zoo.names()]))
    if as_json:
        print_json(data)
    else:
        words(data)


def _importable(names: list[str]) -> list[type[Technique]]:
    """The techniques of these names; one that cannot be imported is named and left out."""
    from hasten import technique as registry

    kinds = []
    for name in names:
        try:
            kinds.append(registry.get(name))
        except HastenError as error:
            note(f"note: {error}")
    return kinds


def _one_of(what: str, given: str | None, known: set[str]) -> None:
    if given is not None and given not in known:
        raise HastenError(f"There is no {what} {given!r}; there are: {', '.join(sorted(known))}.")


def _unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{name!r} is no technique and no model here.{hint} `hasten list` shows all of them."


def _model_data(name: str, as_json: bool) -> dict[str, Any]:
    import hasten.zoo.catalogue as zoo

    quiet_libraries(as_json, name)
    from hasten import technique as registry
    from hasten.subject import open_subject

    subject = open_subject(name)
    offered = set(subject.slots)
    fitting = [
        k.name for k in _importable(registry.names()) if offered.issuperset(k.contract.slots)
    ]
    card = zoo.card(name) if zoo.is_zoo_name(name) else None
    return {**subject.describe(), "techniques": fitting, "zoo": card}


# -- for people ------------------------------------------------------------------------------------


def _techniques_table(kinds: list[type[Technique]]) -> Table:
    """One section a family, one line a technique, so that it fits in 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, border_style="dim")
    table.add_column("technique", no_wrap=True)
    table.add_column("slot", overflow="fold")
    table.add_column("class", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    for family in sorted({kind.card.family for kind in kinds}):
        table.add_row(Text(family, style="bold"))
        for kind in (kind for kind in kinds if kind.card.family == family):
            card = kind.card
            slots = ", ".join(slot.label for slot in kind.contract.slots)
            paper = "baseline" if card.is_baseline else str(card.year)
            table.add_row(f"  {kind.name}", slots, card.loss.value, paper)
    return table


def _fields(pairs: list[tuple[str, Any]]) -> Table:
    """Names and values, one line each; what is empty is left out."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        if value not in (None, "", [], {}):
            table.add_row(name, Text(", ".join(value) if isinstance(value, list) else str(value)))
    return table


def _card_words(data: dict[str, Any]) -> None:
    screen = console()
    screen.print(Text(data["name"], style="bold").append(f"  {data['title']}", style="not bold"))
    screen.print(Text(data["summary"] + "\n"))
    rival = data["rival"]
    neutral = data["neutral"]
    screen.print(
        _fields(
            [
                (
                    "paper",
                    f"{data['paper']} ({data['year']})"
                    if data["paper"]
                    else "none: a plain baseline",
                ),
                ("link", data["link"]),
                ("family", data["family"]),
                ("fills", data["slots"]),
                ("class", data["loss_class"]),
                ("saves", data["saves"]),
                ("reads", data["reads"]),
                ("changes", data["changes"]),
                ("needs", data["needs"]),
                ("runners", data["runners"]),
                (
                    "trained",
                    f"yes: `hasten prepare MODEL --with {data['name']}`" if data["trained"] else "",
                ),
                (
                    "neutral at",
                    ", ".join(f"{k}={v!r}" for k, v in neutral.items()) if neutral else "",
                ),
                (
                    "must beat",
                    f"{rival['plan']} in {rival['metric']}: {rival['why']}" if rival else "",
                ),
            ]
        )
    )
    if data["knobs"]:
        screen.print()
        screen.print(_knobs_table(data["knobs"]))
    if data["claims"]:
        screen.print("\nWhat the paper claims (cited, not measured here):")
        for claim in data["claims"]:
            screen.print(Text(f"  {claim['what']}: {claim['value']:g} ({claim['where']})"))
    if data["notes"]:
        screen.print(Text("\n" + data["notes"]))


def _knobs_table(knobs: list[dict[str, Any]]) -> Table:
    from hasten.docs import knob_limits

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, border_style="dim")
    table.add_column("knob", no_wrap=True, style="bold")
    for heading in ("type", "default", "allowed"):
        table.add_column(heading, overflow="fold")
    table.add_column("consequence", overflow="fold")
    for knob in knobs:
        cells = (knob["name"], knob["type"], repr(knob["default"]), knob_limits(knob), knob["help"])
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _model_words(data: dict[str, Any]) -> None:
    screen = console()
    screen.print(Text(data["name"], style="bold"))
    screen.print(
        _fields(
            [
                ("family", data["kind"]),
                ("engine", data["engine"]),
                ("parameters", f"{data['parameters']:,}"),
                ("bytes", f"{data['bytes']:,} ({data['dtype']})"),
                ("context", f"{data['context']:,} tokens" if data["context"] else "not stated"),
                ("slots", data["slots"]),
                ("techniques", data["techniques"]),
                ("hash", data["hash"]),
            ]
        )
    )
    card = data["zoo"]
    if card:
        source, training, quality = (card.get(key, {}) for key in ("data", "training", "quality"))
        screen.print()
        screen.print(
            _fields(
                [
                    ("trained on", source.get("source")),
                    ("tokens seen", f"{training.get('tokens_seen', 0):,}"),
                    ("loss", f"{quality.get('loss', float('nan')):.3f} nats per token"),
                    (
                        "held out",
                        f"{quality.get('bits_per_byte', float('nan')):.3f} bits per byte "
                        f"(xz -9: {quality.get('xz_bits_per_byte', float('nan')):.3f})",
                    ),
                ]
            ),
        )
