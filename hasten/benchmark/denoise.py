"""The benchmark of Diffusers pipelines: the pipeline as it is, and every plan, in turns.

The baseline is the pipeline's own loop at the given number of steps, in the faster dtype and on the
faster runner. Pictures are compared pair by pair with the baseline's from the same noise. For the
models of the zoo they are also judged by what they show: an exact reader says which of the things
that the caption asks for are there, and a small classifier's features say how far the set is from
real scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from hasten.applied import runs_on
from hasten.benchmark.calls import (
    Array,
    Picture,
    pictures_of,
    plain_prompts,
    training_arguments,
    training_prompts,
)
from hasten.benchmark.ceilings import pipeline_ceiling
from hasten.benchmark.choice import Setting, fastest, settings_of
from hasten.benchmark.missing import check_parts, train_parts
from hasten.benchmark.picture_judge import compare, prove
from hasten.benchmark.scenes import SceneJudge, scene_judge
from hasten.benchmark.verdict import claims_of, loss_of, own_activity, verdict
from hasten.denoise.compiled import RUNNERS, check_runner
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.inputs import refusals
from hasten.denoise.pipelines import quiet
from hasten.denoise.shares import Shares, measure_shares
from hasten.denoise.suits import check_plan
from hasten.errors import HastenError
from hasten.measure.ceilings import reached
from hasten.measure.clock import MIN_ROUNDS, Sample, Timings, interleave, stopwatch
from hasten.measure.limits import Limits, limits
from hasten.measure.machine import OF_PIPELINES, machine, versions
from hasten.measure.memory import peak_memory
from hasten.measure.pictures import Samples
from hasten.plan import Plan
from hasten.subject import Subject

Tick = Callable[[int, int, str], None]

BASELINE = "baseline"
NUM_TIMED = 2  # pictures of a timed call series
NUM_SHOWN = 6  # pictures in the report


@dataclass
class DenoiseJob:
    """One benchmark of a pipeline in progress."""

    subject: Subject
    plans: list[Plan]
    timed: list[Picture]
    judged: list[Picture]
    judge: SceneJudge | None
    seed: int
    tick: Tick
    contenders: dict[str, DenoiseModel] = field(default_factory=dict)
    activity: dict[str, dict[str, float]] = field(default_factory=dict)
    shown: dict[str, Array] = field(default_factory=dict)  # pictures for the report

    def try_out(self, plans: list[Plan]) -> None:
        """Make one picture with each plan, so that what cannot run is said before anything is timed.

        Raises:
            HastenError: where the pipeline refuses the call, or a technique cannot run in it.
        """
        for number, plan in enumerate(plans):
            self.tick(number, len(plans), f"trying {str(plan) or BASELINE}")
            with refusals(self.subject.pipe):
                made = self.timed[0].call(DenoiseModel(self.subject, plan, exclusive=False))
            self.timed[0].check_size(made, self.subject.kind)

    def bind(self, runner: str, *, forced: bool) -> None:
        """Put all plans on the subject, on a runner where their techniques can run on it."""
        self.contenders = {}
        for plan in [Plan(()), *self.plans]:
            able = forced or runs_on(runner, plan)
            self.contenders[str(plan) or BASELINE] = DenoiseModel(
                self.subject, plan, runner=runner if able else "eager", exclusive=False
            )

    def choose_setting(self, stored: Subject | None, wanted: str) -> str:
        """Give the plain pipeline its best dtype and runner; returns the runner's name."""
        settings = settings_of(self.subject, stored, RUNNERS if wanted == "auto" else (wanted,))
        if len(settings) == 1 and wanted == "eager":
            return wanted

        def call_of(setting: Setting) -> Callable[[], Sample]:
            plan, runner = Plan(()), setting.runner
            plain = DenoiseModel(setting.subject, plan, runner=runner, exclusive=False)
            return partial(self._one, plain)

        best = fastest(settings, call_of, seed=self.seed, tick=self.tick)
        self.subject = best.subject
        return best.runner

    def _one(self, model: DenoiseModel) -> Sample:
        with stopwatch(self.subject.model.device) as watch:
            self.timed[0].call(model)
        return Sample(watch.seconds, 1)

    # -- speed -----------------------------------------------------------------------------------
    def time(self, rounds: int) -> Timings:
        """All contenders in turns; a sample counts pictures."""
        calls = {name: partial(self._call, name) for name in self.contenders}
        return interleave(calls, rounds=rounds, warmup=1, on_tick=self.tick, seed=self.seed)

    def _call(self, name: str) -> Sample:
        model, seconds, total = self.contenders[name], 0.0, dict[str, float]()
        for picture in self.timed:
            with stopwatch(self.subject.model.device) as watch:
                picture.call(model)
            seconds += watch.seconds
            for key, value in model.activity.items():
                total[key] = total.get(key, 0.0) + value
        self.activity[name] = total
        return Sample(seconds, len(self.timed))

    def pictures(self, name: str) -> Array:
        """(count, ...) the pictures for quality that a contender makes."""
        return np.concatenate([picture.call(self.contenders[name]) for picture in self.judged])

    # -- rows --------------------------------------------------------------------------------------
    def row(
        self, name: str, timings: Timings, quality: dict[str, Any], shares: Shares, same: bool
    ) -> dict[str, Any]:
        """One row of the result."""
        model = self.contenders[name]
        plan, activity = model.plan, self.activity[name]
        loss = loss_of(plan)
        proof = prove(loss, quality, same)
        ratio, top = timings.ratio(name), pipeline_ceiling(plan, shares)
        word, reason = verdict(plan, ratio, activity, proof, top)
        with peak_memory(self.subject.model.device) as peak:
            self.timed[0].call(model)
        loop = {key: activity.get(key, 0.0) for key in ("calls", "skipped", "rows", "steps")}
        return {
            "plan": name,
            "runner": model.runner,
            "ratio": ratio.to_dict(),
            "images_per_second": timings.tokens_per_second(name).to_dict(),
            "calls_ratio": self.activity[BASELINE]["rows"] / max(1.0, activity.get("rows", 0.0)),
            "ceiling": top.value,
            "ceiling_detail": top.to_dict(),
            "reached": reached(ratio.median, top),
            "activity": own_activity(plan, activity) | loop,
            "loss_class": loss.value,
            "proof": proof,
            "quality": quality,
            "peak_bytes": int(peak.bytes),
            "verdict": word,
            "reason": reason,
            "claims": claims_of(plan),
        }

    def baseline(self, timings: Timings, shares: Shares, limits: Limits) -> dict[str, Any]:
        """The pipeline as it is."""
        plain = self.contenders[BASELINE]
        with peak_memory(self.subject.model.device) as peak:
            self.timed[0].call(plain)
        seconds = timings.seconds(BASELINE).median
        dtype = "bf16" if self.subject.model.dtype == torch.bfloat16 else "fp32"
        flops = shares.flops * len(self.timed)
        return {
            "runner": plain.runner,
            "images_per_second": timings.tokens_per_second(BASELINE).to_dict(),
            "limit_fraction": limits.fraction_of_limit(
                flops_per_second=flops / seconds, dtype=dtype
            ),
            "activity": self.activity[BASELINE],
            "shares": shares.to_dict(),
            "peak_bytes": int(peak.bytes),
        }

    def result(self, timings: Timings, limits: Limits) -> dict[str, Any]:
        """Baseline and rows, after quality and proofs."""
        plain, count = self.contenders[BASELINE], len(self.contenders)
        shares = measure_shares(plain, self.timed[0].call)
        self.tick(0, count, "quality: the original's pictures")
        original = self.pictures(BASELINE) if self.judged else None
        first = self.timed[0].call(plain)
        self.shown = {BASELINE: first if original is None else original[:NUM_SHOWN]}
        rows = []
        for number, name in enumerate(self.contenders):
            if name == BASELINE:
                continue
            self.tick(number, count, f"quality and proof of {name}")
            made = self.timed[0].call(self.contenders[name])
            same, quality = np.array_equal(made, first), dict[str, Any]()
            if original is not None:
                made = self.pictures(name)
                quality = compare(made, original, self.judge, self.seed)
            self.shown[name] = made[:NUM_SHOWN]
            rows.append(self.row(name, timings, quality, shares, same))
        self.tick(count, count, "")
        return {
            "quick": timings.quick,
            "baseline": self.baseline(timings, shares, limits),
            "rows": rows,
        }


def bench_denoise(
    subject: Subject,
    stored: Subject | None,
    plans: list[Plan],
    *,
    runner: str,
    prompts: list[str] | None,
    steps: int,
    guidance: float | None,
    pictures: int,
    arguments: Mapping[str, Any],
    rounds: int,
    quality: bool,
    seed: int,
    train: bool,
    tick: Tick,
) -> dict[str, Any]:
    """Everything but command and pairs of a result; see `hasten.bench`.

    Args:
        stored: the subject in its checkpoint's own dtype, where that may be chosen.
        train: train parts that are missing, for just such calls as are measured.
    """
    _check_counts(pictures, rounds)
    judge = None if prompts else scene_judge(subject, pictures, seed)
    texts = prompts or (plain_prompts(subject.pipe) if judge is None else judge.prompts())
    make = pictures_of(
        subject,
        texts,
        max(pictures, NUM_TIMED),
        steps=steps,
        guidance=guidance,
        arguments=arguments,
        seed=seed,
    )
    for plan in plans:
        check_runner("eager" if runner == "auto" else runner, plan)
        check_plan(subject.pipe, plan)
    judged = make[:pictures] if quality else []
    with ExitStack() as stack:
        for one in (subject, *([stored] if stored is not None else [])):
            stack.enter_context(quiet(one.pipe))
        if not train:
            check_parts(subject, plans, training_arguments(make[0]))
        job = DenoiseJob(subject, plans, make[:NUM_TIMED], judged, judge, seed, tick)
        job.try_out([Plan(())])  # training for a call that the pipeline refuses would be in vain
        train_parts(
            subject,
            plans,
            seed=seed,
            tick=tick,
            prompts=training_prompts(subject),
            arguments=training_arguments(make[0]),
        )
        job.try_out(plans)
        found = limits(on_tick=tick)
        chosen = job.choose_setting(stored, runner)
        job.bind(chosen, forced=runner != "auto")
        result = job.result(job.time(rounds), found)
    captions = [texts[i % len(texts)] for i in range(len(job.shown[BASELINE]))]
    return {
        "machine": machine(),
        "versions": versions(*OF_PIPELINES),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "subject": job.subject.describe() | {"runner": chosen},
        "workload": {
            "prompts": len(texts),
            "steps": steps,
            "guidance": guidance,
            "pictures": len(judged),
            "source": "held-out scenes" if judge is not None else "prompts",
        },
        "limits": found.to_dict(),
        **result,
        "samples": Samples(captions, job.shown),
    }


def _check_counts(pictures: int, rounds: int) -> None:
    for name, value, least in (("pictures", pictures, 1), ("rounds", rounds, MIN_ROUNDS)):
        if value < least:
            raise HastenError(f"{name}={value}; it must be {least} or more.")
