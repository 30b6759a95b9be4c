"""`bench`, `limits` and `ledger`: measure here, and show what was measured."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.call_arguments import Arguments, read_arguments
from hasten.cli.shared import (
    AsJson,
    BlockLength,
    Dtype,
    DtypeName,
    Guidance,
    MaxNewTokens,
    Model,
    Plans,
    Runner,
    RunnerName,
    Seed,
    Steps,
    Threads,
    at_least,
    check_output,
    check_seed,
    console,
    need_extra,
    note,
    only_json,
    plan_texts,
    print_json,
    progress,
    quiet_libraries,
    read_text,
    verb,
)
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.measure.ledger import Entry


@verb(
    "hasten bench code-lm --with medusa",
    'hasten bench code-lm --with medusa --with "prefix_kv(budget=0.3)" --pairs',
    "hasten bench code-lm --with plan.toml --report report.html",
    'hasten bench code-lm --with "d2o(budget=0.25)" --beside "random_eviction(budget=0.25)"',
    "hasten bench ./my-model --with prompt_lookup --prompts prompts.txt --json",
    "hasten bench scenes-dit --with zeus --with adaptive_guidance",
    'hasten bench ./my-pipeline --with easy_cache --beside "easy_cache(threshold=0.1)" --argument height=512',
)
def bench(
    model: Model,
    plans: Plans,
    runner: Runner = RunnerName.AUTO,
    dtype: Dtype = DtypeName.AUTO,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt. Repeatable. Default: held-out text."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A prompt a line; or a .json list, or .jsonl with a text a line."
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    block_length: BlockLength = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    argument: Arguments = None,
    pictures: Annotated[
        int, typer.Option(metavar="N", help="Pictures of a pipeline to compare and judge.")
    ] = 32,
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Rounds of baseline and candidate in turns, 5 or more.")
    ] = 9,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="Measure each pair of techniques too.")
    ] = False,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PLAN", help="A further plan to measure in the same turns. Repeatable."
        ),
    ] = None,
    quality: Annotated[bool, typer.Option(help="Measure quality beside speed.")] = True,
    prepare: Annotated[bool, typer.Option(help="Train parts that are missing.")] = True,
    record: Annotated[bool, typer.Option(help="Write the result into the ledger.")] = True,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write an HTML report.")
    ] = None,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure a plan beside the plain model: speed, its limit, proof of its class, quality, memory.

    Each technique gets a row of its own, and the whole plan the last one.
    """
    from hasten.measure.clock import MIN_ROUNDS

    at_least(
        1,
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        threads=threads,
        steps=steps,
        pictures=pictures,
    )
    at_least(MIN_ROUNDS, rounds=rounds)
    check_seed(seed)
    if report is not None:
        need_extra("matplotlib", "report")
        check_output(report)
    further = read_arguments(argument)
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    with only_json(as_json):
        quiet_libraries(as_json, model)
        chosen = plan_texts(plans)
        from hasten.benchmark import bench as measure

        with progress(as_json) as tick:
            result = measure(
                model,
                *chosen,
                runner=runner.value,
                dtype=dtype.value,
                prompts=texts or None,
                max_new_tokens=max_new_tokens,
                block_length=block_length,
                steps=steps,
                guidance=guidance,
                pictures=pictures,
                arguments=further,
                rounds=rounds,
                pairs=pairs,
                beside=plan_texts(beside or []),
                quality=quality,
                seed=seed,
                threads=threads,
                prepare_missing=prepare,
                record=record,
                command=shlex.join(["hasten", *sys.argv[1:]]),
                tick=tick,
            )
        if not as_json:
            result.show()
        if report is not None:
            result.save_report(report)
            note(f"report: {report}")
    if as_json:
        print_json(result.to_dict())


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: .json a list, .jsonl one value a line, else one prompt a line."""
    text = read_text(path)
    kind = path.suffix.lower()
    try:
        if kind == ".json":
            found = json.loads(text)
            found = found if isinstance(found, list) else [found]
        elif kind == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = [line for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise HastenError(f"{path} is not valid JSON: {error}.") from error
    values = [
        item.get("prompt", item.get("text")) if isinstance(item, dict) else item for item in found
    ]
    prompts = [value for value in values if isinstance(value, str) and value]
    if not prompts or len(prompts) < len(values):
        raise HastenError(
            f"{path} holds no prompts; give a text a line, or JSON texts in .json or .jsonl."
        )
    return prompts


@verb(
    "hasten limits",
    "hasten limits --refresh",
    "hasten limits --json",
)
def limits(
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure anew instead of taking the kept figures.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what this machine can do at best (about five seconds), or show what was measured."""
    with only_json(as_json):
        from hasten.measure.limits import limits as measure
        from hasten.measure.tables import limits_table

        with progress(as_json) as tick:
            found = measure(refresh, tick)
    if as_json:
        print_json(found.to_dict())
    else:
        console().print(limits_table(found))


@verb(
    "hasten ledger",
    "hasten ledger --technique medusa",
    "hasten ledger --subject code-lm --json",
)
def ledger(
    technique: Annotated[str | None, typer.Option(help="Only plans with this technique.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only this model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what was measured here, beside what the papers claim; what no longer holds is dim."""
    with only_json(as_json):
        from hasten import technique as registry
        from hasten.measure.ledger import Ledger
        from hasten.measure.tables import ledger_table

        entries = Ledger().entries(technique, subject)
        if technique is not None and not entries:
            registry.get(technique)  # an unknown name is a mistake, not an empty answer
        cards = _cards(entries)
    if as_json:
        print_json({"entries": [_with_claims(entry, cards) for entry in entries]})
    else:
        console().print(ledger_table(entries, cards))


def _cards(entries: list[Entry]) -> dict[str, Any]:
    """Cards of the techniques that entries name and that are still installed."""
    from hasten import technique as registry

    named = {name for entry in entries for name in entry.techniques}
    return {name: registry.get(name).card for name in named.intersection(registry.names())}


def _with_claims(entry: Entry, cards: dict[str, Any]) -> dict[str, Any]:
    claims = {name: cards[name].claims for name in entry.techniques if name in cards}
    return {**entry.to_dict(), "claims": claims}
