"""Runs a benchmark: baseline, plans and the naive way in turns, then quality, proofs and verdicts."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.api import Model, check_engine, prepare
from hasten.benchmark.ceilings import BaselineTimes, plan_ceiling, token_work
from hasten.benchmark.judge import Answers, answer, compare, prove
from hasten.benchmark.verdict import own_activity, verdict
from hasten.benchmark.workload import Workload, make_workload
from hasten.causal.engine import CausalModel
from hasten.errors import HastenError, PlanError
from hasten.measure.clock import Sample, Timings, interleave, stopwatch
from hasten.measure.ledger import Entry, Ledger
from hasten.measure.limits import Limits, limits
from hasten.measure.machine import machine, versions
from hasten.measure.memory import peak_memory
from hasten.measure.plain import plain
from hasten.parts import find
from hasten.plan import Plan, conflict
from hasten.subject import Subject, open_subject
from hasten.technique import Loss, Technique

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hasten.measure.pictures import Samples

Tick = Callable[[int, int, str], None]

NAIVE = "model.generate"
BASELINE = "baseline"
ROUNDS = 9  # with nine, one disturbed round does not reach the interval
CHOICE_ROUNDS = 7  # in which the baseline's settings are compared
PREPARE_BYTES = 4_000_000  # of the standard library, to train parts on
CLASS_ORDER = (Loss.EXACT, Loss.DISTRIBUTION, Loss.LOSSY)


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


@dataclass
class _Contender:
    """One plan ready to run, on the runner that suits it."""

    plan: Plan
    model: CausalModel
    activity: Counter[str] = field(default_factory=Counter)
    cache_bytes: int = 0

    @property
    def loss(self) -> Loss:
        """The loosest class of the plan's techniques."""
        classes = [technique.loss_class() for technique in self.plan] or [Loss.EXACT]
        return max(classes, key=CLASS_ORDER.index)


def bench(
    model: Model,
    *plan: str | Plan | Technique,
    runner: str = "auto",
    dtype: str = "auto",
    prompts: list[str] | None = None,
    max_new_tokens: int = 128,
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
        steps, guidance: of the sampler, for Diffusers pipelines; guidance None is the pipeline's own.
        pictures: how many pictures of a pipeline are compared and judged.
        arguments: further arguments of a pipeline's call, such as height and width.
        rounds: timed rounds; fewer than 5 are refused.
        pairs: also measure every pair of the techniques.
        beside: further plans, each on its own, measured in the same turns: rivals to compare with.
            They need not go together with the plan or with each other.
        prepare_missing: train parts that are missing (takes minutes); otherwise that is an error.
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
    if record:
        Ledger().check_writable()
    stored = None
    if dtype == "auto" and isinstance(model, str | os.PathLike):
        stored = open_subject(model, dtype="stored")
    if subject.engine != "causal":
        if subject.engine == "masked" and runner == "compiled":
            raise PlanError(f"The masked engine runs on 'eager' only, not on {runner!r}.")
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
        if subject.engine == "denoise":
            options = {
                "runner": runner,
                "steps": steps,
                "guidance": guidance,
                "pictures": pictures,
                "arguments": arguments or {},
            }
        return _bench_other(
            subject,
            stored,
            parsed,
            others,
            pairs=pairs,
            record=record,
            command=command,
            prompts=prompts,
            rounds=rounds,
            quality=quality,
            seed=seed,
            tick=tick or (lambda done, total, message: None),
            **options,
        )
    work = make_workload(
        subject, prompts=prompts, max_new_tokens=max_new_tokens, seed=seed, quality=quality
    )
    job = _Job(subject, work, seed, tick or (lambda done, total, message: None))
    plans = _distinct(rows_of(parsed), _pairs_of(parsed) if pairs else [], others)
    if prepare_missing:
        job.prepare([technique for one in plans for technique in one])
    machine_limits = limits(on_tick=tick)
    chosen = job.choose_setting(stored, runner)
    everything = job.contenders(plans, chosen, forced=runner != "auto")
    timings = job.time(everything, rounds)
    result = job.result(everything, timings, machine_limits, quality)
    return _finished(result, parsed, others, pairs=pairs, record=record, command=command)


def _bench_other(
    subject: Subject,
    stored: Subject | None,
    parsed: Plan,
    others: list[Plan],
    *,
    pairs: bool,
    record: bool,
    command: str | None,
    tick: Tick,
    **options: Any,
) -> BenchResult:
    """`bench` for a masked-diffusion model or a Diffusers pipeline."""
    measure: Callable[..., dict[str, Any]]
    if subject.engine == "masked":
        from hasten.benchmark.masked import bench_masked as measure
    else:
        from hasten.benchmark.denoise import bench_denoise as measure
    plans = _distinct(rows_of(parsed), _pairs_of(parsed) if pairs else [], others)
    found = limits(on_tick=tick)
    result = measure(subject, stored, plans, found, tick=tick, **options)
    samples = result.pop("samples", None)
    done = _finished(result, parsed, others, pairs=pairs, record=record, command=command)
    done.samples = samples
    return done


def _pairs_of(plan: Plan) -> list[Plan]:
    """Every legal pair of a plan's techniques."""
    return [Plan.parse(a, b) for a, b in combinations(plan, 2) if not conflict(a, b)]


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
    """Add command and pairs, sort the rows by what was asked for, and write them down."""
    measured = {row["plan"]: row for row in result["rows"]}
    result["command"] = command or _command()
    result["pairs"] = pair_matrix(plan, result["rows"]) if pairs else []
    result["rows"] = [measured[str(one)] for one in rows_of(plan)]
    result["beside"] = [measured[str(one)] for one in others]
    found: dict[str, Any] = plain(result)
    if record:
        _record(found)
    return BenchResult(found)


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


@dataclass
class _Job:
    """One benchmark in progress: counts its own work so that the time left can be told."""

    subject: Subject
    work: Workload
    seed: int
    tick: Tick
    answers: dict[str, Answers] = field(default_factory=dict)

    def prepare(self, techniques: Iterable[Technique]) -> None:
        """Train what is missing, and keep it where `apply` finds it."""
        untrained = [t for t in techniques if t.trained and find(t, self.subject.hash) is None]
        missing = {str(Plan.parse(technique)): technique for technique in untrained}.values()
        for technique in missing:
            from hasten.zoo.corpus import training_texts

            texts = training_texts(PREPARE_BYTES)
            prepare(
                self.subject,
                technique,
                texts=texts,
                seed=self.seed,
                tick=self._naming(f"training {technique.name}"),
            )

    def _naming(self, words: str) -> Tick:
        """A tick that says what it is about."""
        return lambda done, total, message: self.tick(done, total, f"{words}: {message}")

    def choose_setting(self, stored: Subject | None, wanted: str) -> str:
        """Give the baseline its best setting: dtype and runner; returns the runner's name.

        Of dtypes only float32 and the checkpoint's own are tried, which hold every stored weight; a
        narrower one would round them. float32 has to be faster beyond the noise, since it takes
        twice the memory. Compiling is not counted.
        """
        subjects = [self.subject]
        if stored is not None and stored.model.dtype != self.subject.model.dtype:
            subjects = [stored, self.subject]
        names = ("eager", "compiled") if wanted == "auto" else (wanted,)
        if len(subjects) * len(names) == 1:
            return wanted
        calls: dict[str, Callable[[], Sample]] = {}
        settings: dict[str, tuple[Subject, str]] = {}
        for subject in subjects:
            for name in names:
                label = f"{str(subject.model.dtype).removeprefix('torch.')} {name}"
                self.tick(len(settings), len(subjects) * len(names), f"trying {label}")
                self.subject = subject
                contender = self._open(Plan(()), name)
                call = partial(self._call, contender, self.work.prompts[:1])
                settings[label] = (subject, name)
                try:
                    call()  # compiles
                except HastenError:
                    raise
                except (
                    Exception
                ) as error:  # a compiler that is missing or fails is no reason to stop
                    self.tick(0, 1, f"{label} does not run here: {type(error).__name__}")
                else:
                    calls[label] = call
        if not calls:
            raise HastenError(f"The runner {wanted!r} does not run here; use --runner auto.")
        timings = interleave(calls, rounds=CHOICE_ROUNDS, warmup=1, on_tick=self.tick)
        best = [self._faster(timings, calls, settings, subject) for subject in subjects]
        other = len(best) > 1 and timings.ratio(best[1], to=best[0]).is_faster
        self.subject, runner = settings[best[1] if other else best[0]]
        return runner

    @staticmethod
    def _faster(
        timings: Timings,
        calls: Mapping[str, Any],
        settings: Mapping[str, tuple[Subject, str]],
        subject: Subject,
    ) -> str:
        """The fastest setting of one subject."""
        mine = [label for label in calls if settings[label][0] is subject]
        return min(mine, key=lambda label: timings.seconds(label).median)

    def contenders(self, plans: list[Plan], chosen: str, *, forced: bool) -> dict[str, _Contender]:
        """The baseline and all plans, each on the chosen runner or on the one that can carry it."""
        found = {BASELINE: self._open(Plan(()), chosen)}
        for plan in plans:
            fits = all(chosen in technique.contract.runners for technique in plan)
            if not fits and forced:
                raise PlanError(f"{plan} does not run on the {chosen!r} runner; use --runner auto.")
            found[str(plan)] = self._open(plan, chosen if fits else "eager")
        return found

    def _open(self, plan: Plan, runner: str) -> _Contender:
        return _Contender(plan, CausalModel(self.subject, plan, runner=runner, exclusive=False))

    def time(self, contenders: dict[str, _Contender], rounds: int) -> Timings:
        """All contenders and the naive way, in turns."""
        calls: dict[str, Callable[[], Sample]] = {
            name: partial(self._call, contender) for name, contender in contenders.items()
        }
        calls[NAIVE] = self._naive
        # Two warm-up rounds: the first compiles what is compiled.
        return interleave(calls, rounds=rounds, warmup=2, on_tick=self.tick, seed=self.seed)

    def _call(self, contender: _Contender, prompts: Sequence[Tensor] | None = None) -> Sample:
        """All prompts (or those given) through one plan; prompt and decoding apart."""
        seconds = prefill = 0.0
        tokens = 0
        contender.activity = Counter()
        contender.cache_bytes = 0
        for prompt in self.work.prompts if prompts is None else prompts:
            with stopwatch(self.subject.model.device) as watch:
                out = contender.model.generate(
                    prompt, max_new_tokens=self.work.max_new_tokens, do_sample=False
                )
            assert isinstance(out, Tensor)
            seconds += watch.seconds
            prefill += contender.model.prefill_seconds
            tokens += out.shape[1] - prompt.shape[1]
            contender.activity.update(contender.model.activity)
            contender.cache_bytes = max(contender.cache_bytes, contender.model.cache_bytes)
        phases = {"prefill_seconds": prefill, "decode_seconds": seconds - prefill}
        return Sample(seconds, tokens, phases)

    @torch.no_grad()
    def _naive(self) -> Sample:
        """What a user of transformers runs today."""
        seconds, tokens = 0.0, 0
        for prompt in self.work.prompts:
            with stopwatch(self.subject.model.device) as watch:
                out = self.subject.model.generate(  # type: ignore[operator]
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=self.work.max_new_tokens,
                    do_sample=False,
                )
            seconds += watch.seconds
            tokens += out.shape[1] - prompt.shape[1]
        return Sample(seconds, tokens)

    def result(
        self, contenders: dict[str, _Contender], timings: Timings, found: Limits, quality: bool
    ) -> dict[str, Any]:
        """The whole object, without command and pairs."""
        base = contenders[BASELINE]
        lengths = [p.shape[1] + self.work.max_new_tokens / 2 for p in self.work.prompts]
        work = token_work(self.subject, sum(lengths) / len(lengths))
        prefill = timings.phase(BASELINE, "prefill_seconds")
        tokens = timings.samples[BASELINE][0].tokens
        calls = len(self.work.prompts)
        times = BaselineTimes(
            timings.seconds(BASELINE).median / calls,
            (prefill.median if prefill else 0.0) / calls,
            tokens / calls,
        )
        # The reference of every proof is the eager runner, whichever runner is timed.
        reference = self._open(Plan(()), "eager")
        total = len(contenders) * self._answers_per_plan()
        counter = _Counter(total, self.tick, "quality and proofs")
        original = answer(reference.model, self.work, counter)
        rows = []
        for name, contender in contenders.items():
            if name == BASELINE:
                continue
            rows.append(
                self._row(
                    name,
                    contender,
                    reference,
                    original,
                    timings,
                    times,
                    work,
                    found,
                    counter,
                    quality,
                )
            )
        speed = timings.tokens_per_second(BASELINE)
        return {
            "machine": machine(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "seed": self.seed,
            "quick": timings.quick,
            "subject": self.subject.describe() | {"runner": base.model.runner.name},
            "workload": {
                "prompts": calls,
                "prompt_tokens": [int(p.shape[1]) for p in self.work.prompts],
                "max_new_tokens": self.work.max_new_tokens,
                "source": self.work.source,
                "passages": len(self.work.passages),
                "retrievals": len(self.work.retrievals),
            },
            "limits": found.to_dict(),
            "baseline": {
                "runner": base.model.runner.name,
                "tokens_per_second": speed.to_dict(),
                "prefill_seconds": times.prefill_seconds,
                "decode_tokens_per_second": 1.0 / times.decode_seconds_per_token,
                "limit_fraction": found.fraction_of_limit(
                    bytes_per_second=work.total_bytes / times.decode_seconds_per_token,
                    working_set_bytes=work.total_bytes,
                ),
                "peak_bytes": self._peak(base),
                "cache_bytes": base.cache_bytes,
                "naive": {
                    "runner": NAIVE,
                    "tokens_per_second": timings.tokens_per_second(NAIVE).to_dict(),
                    "ratio": timings.ratio(NAIVE).to_dict(),
                },
            },
            "rows": rows,
        }

    def _answers_per_plan(self) -> int:
        work = self.work
        return len(work.prompts) + len(work.passages) + len(work.retrievals)

    def _row(
        self,
        name: str,
        contender: _Contender,
        reference: _Contender,
        original: Answers,
        timings: Timings,
        times: BaselineTimes,
        work: Any,
        found: Limits,
        counter: _Counter,
        quality: bool,
    ) -> dict[str, Any]:
        plan = contender.plan
        activity = {key: float(value) for key, value in contender.activity.items()}
        # Of decoding only: each prompt takes one pass over itself, which gives one token.
        for key in ("passes", "emitted"):
            activity[key] -= len(self.work.prompts)
        activity["positions"] -= sum(prompt.shape[1] for prompt in self.work.prompts)
        counter.message = f"quality and proof of {name}"
        ours = answer(contender.model, self.work, counter)
        block = compare(ours, original, self.work, self.seed)
        proof = prove(
            contender.loss,
            contender.model,
            reference.model,
            ours,
            original,
            block,
            self.work,
            counter,
        )
        top = plan_ceiling(plan, self.subject, times, work, found)
        ratio = timings.ratio(name)
        word, reason = verdict(plan, ratio, activity, proof, top)
        from hasten.measure.ceilings import reached

        return {
            "plan": name,
            "runner": contender.model.runner.name,
            "ratio": ratio.to_dict(),
            "tokens_per_second": timings.tokens_per_second(name).to_dict(),
            "prefill_seconds": _median(timings, name, "prefill_seconds", len(self.work.prompts)),
            # Of what plain decoding could do at best: a plan that moves fewer bytes may pass 1.
            "limit_fraction": found.fraction_of_limit(
                bytes_per_second=work.total_bytes * self._decode_rate(timings, name),
                working_set_bytes=work.total_bytes,
            ),
            "ceiling": top.to_dict()["value"],
            "ceiling_detail": top.to_dict(),
            "reached": reached(ratio.median, top),
            "activity": own_activity(plan, activity)
            | {k: v for k, v in activity.items() if k in ("passes", "positions", "emitted")},
            "loss_class": contender.loss.value,
            "proof": proof,
            "quality": block if quality else {},
            "peak_bytes": self._peak(contender),
            "cache_bytes": contender.cache_bytes,
            "verdict": word,
            "reason": reason,
            "claims": [
                {"technique": t.name, "what": c.what, "value": c.value, "where": c.where}
                for t in plan
                for c in t.card.claims
            ],
        }

    def _decode_rate(self, timings: Timings, name: str) -> float:
        """Tokens a second after each prompt and the token that comes with it."""
        spread = timings.phase(name, "decode_seconds")
        assert spread is not None
        tokens = timings.samples[name][0].tokens - len(self.work.prompts)
        return tokens / max(spread.median, 1e-9)

    def _peak(self, contender: _Contender) -> int:
        """Peak memory of the process during one call of its own."""
        with peak_memory(self.subject.model.device) as peak:
            contender.model.generate(
                self.work.prompts[0], max_new_tokens=self.work.max_new_tokens, do_sample=False
            )
        return int(peak.bytes)


@dataclass
class _Counter:
    """Counts steps of known number and passes them on."""

    total: int
    tick: Tick
    message: str
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        self.tick(min(self.done, self.total), self.total, self.message)


def _median(timings: Timings, name: str, phase: str, calls: int) -> float | None:
    spread = timings.phase(name, phase)
    return spread.median / calls if spread else None


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
        )
        for row in (*result["rows"], *result["beside"])
    ]
    if entries:
        Ledger().record_all(entries)
