"""Runs a benchmark: baseline, plans and the naive way in turns, then quality, proofs and verdicts."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hasten.api import Model, check_engine
from hasten.denoise.step_counts import for_steps
from hasten.errors import HastenError
from hasten.measure.ledger import Entry, Ledger
from hasten.measure.plain import plain
from hasten.plan import Plan, conflict
from hasten.subject import Subject, open_subject
from hasten.technique import Technique

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hasten.measure.pictures import Samples

Tick = Callable[[int, int, str], None]

ROUNDS = 9  # with nine, one disturbed round does not reach the interval


@dataclass
class BenchResult:
    """What a benchmark found; `to_dict()` is the object of `hasten bench --json`."""

    data: dict[str, Any]
    samples: Samples | None = None  # pictures that the plans made, for the report

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return self.data

    def table(self) -> RenderableType:
        """The table for a terminal."""
        from hasten.measure.tables import bench_table

        return bench_table(self.data)

    def show(self) -> None:
        """Print the table, and the pairs where they were measured."""
        from rich.console import Console

        from hasten.measure.tables import pairs_table

        console = Console()
        console.print(self.table())
        if self.data["pairs"]:
            console.print(pairs_table(self.data))

    def save_report(self, path: str | Path) -> Path:
        """Write one self-contained HTML file with tables and plots."""
        from hasten.measure.report import write_report

        return write_report(self.data, path, self.samples)


def bench(
    model: Model,
    *plan: str | Plan | Technique,
    runner: str = "auto",
    dtype: str = "auto",
    prompts: list[str] | None = None,
    max_new_tokens: int = 128,
    block_length: int | None = None,
    steps: int = 50,
    guidance: float | None = None,
    pictures: int = 32,
    arguments: Mapping[str, Any] | None = None,
    rounds: int = ROUNDS,
    pairs: bool = False,
    beside: Sequence[str | Plan | Technique] = (),
    quality: bool = True,
    seed: int = 0,
    threads: int | None = None,
    prepare_missing: bool = True,
    record: bool = True,
    command: str | None = None,
    tick: Tick | None = None,
) -> BenchResult:
    """Measure techniques beside the original: each alone and, last, the whole plan.

    Args:
        model: a zoo name, a checkpoint folder, a hub id, or a live model.
        plan: techniques; see `Plan.parse`. An empty plan measures the baselines only.
        runner: "auto" takes whichever of eager and compiled is faster for the baseline, and for
            each plan the same one where its techniques run on it; or the name of one.
        dtype: of the weights. "auto" takes whichever is faster of float32 and the checkpoint's own,
            so that no weight is rounded for speed; or "float32", "bfloat16", "float16".
        prompts: texts to time; by default passages of held-out Python source, or captions.
        max_new_tokens: tokens of each text, of language models.
        block_length: of models that fill masks; see `MaskedModel.generate`.
        steps, guidance: of the sampler, for Diffusers pipelines; guidance None is the pipeline's own.
        pictures: how many pictures of a pipeline are compared and judged.
        arguments: further arguments of a pipeline's call, such as height and width.
        rounds: timed rounds; fewer than 5 are refused.
        pairs: also measure every pair of the techniques.
        beside: further plans, each on its own, measured in the same turns: rivals to compare with.
            They need not go together with the plan or with each other.
        prepare_missing: train parts that are missing (takes minutes); otherwise that is an error. A
            pipeline's are trained for these steps, guidance and arguments, on prompts of their own.
        record: write the rows into the ledger.

    Raises:
        HastenError: for bad input; nothing is recorded then.
    """
    parsed = Plan.parse(*plan)
    others = [Plan.parse(one) for one in beside]
    if threads is not None:
        _set_threads(threads)
    subject = open_subject(model, dtype=dtype)
    _check_runner(runner)
    for one in (parsed, *others):
        check_engine(subject, one)
    if arguments and subject.engine != "denoise":
        raise HastenError(f"arguments= is for Diffusers pipelines, and {subject.name} is none.")
    if block_length is not None and subject.engine != "masked":
        raise HastenError(
            f"block_length= is for models that fill masks, and {subject.name} is none."
        )
    if record:
        Ledger().check_writable()
    stored = None
    if dtype == "auto" and isinstance(model, str | os.PathLike):
        stored = open_subject(model, dtype="stored")
    if subject.engine == "denoise":
        parsed, *others = (for_steps(one, steps) for one in (parsed, *others))
    plans = _distinct(rows_of(parsed), _pairs_of(parsed) if pairs else [], others)
    result = _measure(
        subject,
        stored,
        plans,
        runner=runner,
        prompts=prompts,
        rounds=rounds,
        quality=quality,
        seed=seed,
        train=prepare_missing,
        tick=tick or (lambda done, total, message: None),
        of_texts={"max_new_tokens": max_new_tokens},
        block_length=block_length,
        of_pictures={
            "steps": steps,
            "guidance": guidance,
            "pictures": pictures,
            "arguments": arguments or {},
        },
    )
    samples = result.pop("samples", None)
    done = _finished(result, parsed, others, pairs=pairs, record=record, command=command)
    done.samples = samples
    return done


def _measure(
    subject: Subject,
    stored: Subject | None,
    plans: list[Plan],
    *,
    runner: str,
    of_texts: dict[str, Any],
    block_length: int | None,
    of_pictures: dict[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """Everything but command and pairs, by the engine that runs the model."""
    if subject.engine == "denoise":
        from hasten.benchmark.denoise import bench_denoise

        return bench_denoise(subject, stored, plans, runner=runner, **of_pictures, **options)
    if subject.engine == "masked":
        from hasten.benchmark.masked import bench_masked

        return bench_masked(
            subject,
            stored,
            plans,
            runner=runner,
            block_length=block_length,
            **of_texts,
            **options,
        )
    from hasten.benchmark.causal import bench_causal

    return bench_causal(subject, stored, plans, runner=runner, **of_texts, **options)


def _pairs_of(plan: Plan) -> list[Plan]:
    """Every legal pair of a plan's techniques."""
    both = combinations(plan.entries, 2)
    return [Plan((a, b)) for a, b in both if not conflict(a.technique, b.technique)]


def _distinct(*plans: list[Plan]) -> list[Plan]:
    """All plans in their order, each once."""
    return list({str(plan): plan for group in plans for plan in group}.values())


def _finished(
    result: dict[str, Any],
    plan: Plan,
    others: list[Plan],
    *,
    pairs: bool,
    record: bool,
    command: str | None,
) -> BenchResult:
    """Add command, techniques and pairs, sort the rows by what was asked for, and write them down."""
    measured = {row["plan"]: row | techniques_of(row["plan"]) for row in result["rows"]}
    result["command"] = command or _command()
    result["pairs"] = pair_matrix(plan, result["rows"]) if pairs else []
    result["rows"] = [measured[str(one)] for one in rows_of(plan)]
    result["beside"] = [measured[str(one)] for one in others]
    found: dict[str, Any] = plain(result)
    if record:
        _record(found)
    return BenchResult(found)


def techniques_of(plan: str) -> dict[str, Any]:
    """What a plan is made of, for whoever compares plans of the same techniques."""
    entries = Plan.parse(plan).entries
    return {
        "techniques": [
            {
                "name": entry.technique.name,
                "knobs": entry.technique.knobs,
                "written": list(entry.written),
                "is_baseline": entry.technique.card.is_baseline,
            }
            for entry in entries
        ]
    }


def rows_of(plan: Plan) -> list[Plan]:
    """Each technique alone and, last, the whole plan."""
    alone = [Plan((entry,)) for entry in plan.entries]
    return [*alone, plan] if len(plan) > 1 else alone


def pair_matrix(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How every two techniques of a plan go together, judged by the speed of A, B and A+B.

    "additive": the pair reaches the product of both ratios within the noise; "sub-additive": less
    than that; "broken": the pair's proof failed; "refused": the contracts clash.
    """
    by_plan = {row["plan"]: row for row in rows}
    found = []
    for first, second in combinations(plan.entries, 2):
        clash = conflict(first.technique, second.technique)
        entry: dict[str, Any] = {"a": str(first), "b": str(second)}
        if clash:
            found.append(entry | {"kind": "refused", "reason": clash})
            continue
        a, b = by_plan[str(first)], by_plan[str(second)]
        both = by_plan[str(Plan((first, second)))]
        product = a["ratio"]["median"] * b["ratio"]["median"]
        high = both["ratio"]["high"] or both["ratio"]["median"]
        kind = "additive" if high >= product else "sub-additive"
        if not both["proof"]["passed"]:
            kind = "broken"
        found.append(
            entry
            | {
                "ratio_a": a["ratio"]["median"],
                "ratio_b": b["ratio"]["median"],
                "ratio_ab": both["ratio"]["median"],
                "kind": kind,
                "reason": f"together {both['ratio']['median']:.2f}, the product of both is {product:.2f}",
            }
        )
    return found


def _check_runner(runner: str) -> None:
    allowed = ("auto", "eager", "compiled")
    if runner not in allowed:
        raise HastenError(f"runner={runner!r} is not one of {', '.join(allowed)}.")


def _set_threads(threads: int) -> None:
    if not 1 <= threads <= 1024:
        raise HastenError(f"threads={threads} is out of range; allowed is 1 to 1024.")
    torch.set_num_threads(threads)


def _command() -> str:
    return shlex.join(["python", *sys.argv]) if sys.argv and sys.argv[0] else "hasten.bench(...)"


def _record(result: dict[str, Any]) -> None:
    """Write all rows into the ledger in one transaction."""
    entries = [
        Entry(
            plan=row["plan"],
            techniques=tuple(t.name for t in Plan.parse(row["plan"])),
            subject=result["subject"]["name"],
            subject_hash=result["subject"]["hash"],
            command=result["command"],
            threads=result["threads"],
            seed=result["seed"],
            row=row,
            versions=result["versions"],
        )
        for row in (*result["rows"], *result["beside"])
    ]
    if entries:
        Ledger().record_all(entries)
