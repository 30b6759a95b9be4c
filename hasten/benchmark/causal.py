"""The benchmark of causal language models: the model as it is, every plan, and the naive way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.applied import runs_on
from hasten.benchmark.ceilings import BaselineTimes, plan_ceiling, token_work
from hasten.benchmark.choice import Setting, settings_of
from hasten.benchmark.judge import Answers, answer, compare, prove
from hasten.benchmark.missing import check_parts, train_parts
from hasten.benchmark.verdict import claims_of, loss_of, own_activity, verdict
from hasten.benchmark.workload import Workload, make_workload
from hasten.causal.engine import CausalModel
from hasten.errors import HastenError, PlanError
from hasten.measure.ceilings import reached
from hasten.measure.clock import Sample, Timings, interleave, stopwatch
from hasten.measure.limits import Limits, limits
from hasten.measure.machine import machine, versions
from hasten.measure.memory import peak_memory
from hasten.plan import Plan
from hasten.subject import Subject
from hasten.technique import Loss

Tick = Callable[[int, int, str], None]

NAIVE = "model.generate"
BASELINE = "baseline"
CHOICE_ROUNDS = 7  # in which the baseline's settings are compared


def bench_causal(
    subject: Subject,
    stored: Subject | None,
    plans: list[Plan],
    *,
    runner: str,
    prompts: list[str] | None,
    max_new_tokens: int,
    rounds: int,
    quality: bool,
    seed: int,
    train: bool,
    tick: Tick,
) -> dict[str, Any]:
    """Everything but command and pairs of a result; see `hasten.bench`.

    Args:
        stored: the subject in its checkpoint's own dtype, where that may be chosen.
        train: train parts that are missing.
    """
    work = make_workload(
        subject, prompts=prompts, max_new_tokens=max_new_tokens, seed=seed, quality=quality
    )
    if not train:
        check_parts(subject, plans)
    train_parts(subject, plans, seed=seed, tick=tick)
    job = CausalJob(subject, work, seed, tick)
    machine_limits = limits(on_tick=tick)
    chosen = job.choose_setting(stored, runner)
    everything = job.contenders(plans, chosen, forced=runner != "auto")
    timings = job.time(everything, rounds)
    return job.result(everything, timings, machine_limits, quality)


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
        return loss_of(self.plan)


@dataclass
class CausalJob:
    """One benchmark in progress: counts its own work so that the time left can be told."""

    subject: Subject
    work: Workload
    seed: int
    tick: Tick

    def choose_setting(self, stored: Subject | None, wanted: str) -> str:
        """Give the baseline its best setting: dtype and runner; returns the runner's name.

        Of dtypes only float32 and the checkpoint's own are tried, which hold every stored weight; a
        narrower one would round them. float32 has to be faster beyond the noise, since it takes
        twice the memory. Compiling is not counted.
        """
        names = ("eager", "compiled") if wanted == "auto" else (wanted,)
        settings = {each.label: each for each in settings_of(self.subject, stored, names)}
        if len(settings) == 1:
            return wanted
        calls: dict[str, Callable[[], Sample]] = {}
        for number, (label, setting) in enumerate(settings.items()):
            self.tick(number, len(settings), f"trying {label}")
            self.subject = setting.subject
            contender = self._open(Plan(()), setting.runner)
            call = partial(self._call, contender, self.work.prompts[:1])
            try:
                call()  # compiles
            except HastenError:
                raise
            except Exception as error:  # a compiler that is missing or fails is no reason to stop
                self.tick(0, 1, f"{label} does not run here: {type(error).__name__}")
            else:
                calls[label] = call
        if not calls:
            raise HastenError(f"The runner {wanted!r} does not run here; use --runner auto.")
        timings = interleave(calls, rounds=CHOICE_ROUNDS, warmup=1, on_tick=self.tick)
        subjects = {id(each.subject): each.subject for each in settings.values()}.values()
        best = [self._faster(timings, calls, settings, subject) for subject in subjects]
        other = len(best) > 1 and timings.ratio(best[1], to=best[0]).is_faster
        chosen = settings[best[1] if other else best[0]]
        self.subject = chosen.subject
        return chosen.runner

    @staticmethod
    def _faster(
        timings: Timings,
        calls: Mapping[str, Any],
        settings: Mapping[str, Setting],
        subject: Subject,
    ) -> str:
        """The fastest setting of one subject."""
        mine = [label for label in calls if settings[label].subject is subject]
        return min(mine, key=lambda label: timings.seconds(label).median)

    def contenders(self, plans: list[Plan], chosen: str, *, forced: bool) -> dict[str, _Contender]:
        """The baseline and all plans, each on the chosen runner or on the one that can carry it."""
        found = {BASELINE: self._open(Plan(()), chosen)}
        for plan in plans:
            fits = runs_on(chosen, plan)
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
            "claims": claims_of(plan),
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
