"""The benchmark of Diffusers pipelines: the pipeline as it is, and every plan, in turns.

The baseline is the pipeline's own loop at the given number of steps, in the faster dtype and on the
faster runner. Pictures
are compared pair by pair with the baseline's from the same noise. For the models of the zoo they
are also judged by what they show: an exact reader says which of the things that the caption asks
for are there, and a small classifier's features say how far the set is from real scenes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.benchmark.judge import estimate_entry
from hasten.benchmark.scenes import SceneJudge, scene_judge
from hasten.benchmark.verdict import own_activity, verdict
from hasten.denoise.compiled import RUNNERS
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.shares import Shares, measure_shares
from hasten.errors import HastenError
from hasten.measure.ceilings import Ceiling, Term, ceiling, reached
from hasten.measure.clock import Sample, Timings, interleave, stopwatch
from hasten.measure.image_quality import psnr, ssim
from hasten.measure.limits import Limits
from hasten.measure.machine import machine, versions
from hasten.measure.memory import peak_memory
from hasten.measure.pictures import Samples
from hasten.measure.stats import bootstrap_interval, recovery
from hasten.plan import Plan
from hasten.subject import Subject
from hasten.technique import Loss, Technique
from hasten.zoo import catalogue

Tick = Callable[[int, int, str], None]
Array = NDArray[np.float64]

BASELINE = "baseline"
STEPS = 50
CHOICE_ROUNDS = 5  # in which the baseline's settings are compared
NUM_TIMED = 2  # pictures of a timed call series
NUM_PICTURES = 32  # pictures for quality
NUM_SHOWN = 6  # pictures in the report
BROKEN_DB = 10.0  # a lossy plan whose pictures are less like the original's than this is broken

# What somebody who gives no prompt to a pipeline that we know nothing of gets.
PLAIN_PROMPTS = (
    "a red apple on a wooden table",
    "a small boat on a calm lake at sunrise",
    "a cat asleep on a blue chair",
    "an old stone bridge over a river",
)


@dataclass(frozen=True)
class Picture:
    """One picture to make: the arguments of the pipeline's call, and the seed of its noise."""

    arguments: dict[str, Any]
    seed: int

    def call(self, model: DenoiseModel) -> Array:
        """(1, [frames,] height, width, channels) values from 0 to 1."""
        generator = torch.Generator().manual_seed(self.seed)
        made = model(**self.arguments, generator=generator, output_type="np", return_dict=False)[0]
        found: Array = np.asarray(made, dtype=np.float64)
        return found


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

    def bind(self, runner: str, *, forced: bool) -> None:
        """Put all plans on the subject, on a runner where their techniques can run on it."""
        self.contenders = {}
        for plan in [Plan(()), *self.plans]:
            able = forced or all(runner in technique.terms().runners for technique in plan)
            self.contenders[str(plan) or BASELINE] = DenoiseModel(
                self.subject, plan, runner=runner if able else "eager", exclusive=False
            )

    def choose_setting(self, stored: Subject | None, wanted: str) -> str:
        """Give the plain pipeline its best dtype and runner; returns the runner's name.

        Of dtypes only float32 and the checkpoint's own are tried. Compiling is not counted.
        """
        subjects = [self.subject]
        if stored is not None and stored.model.dtype != self.subject.model.dtype:
            subjects = [stored, self.subject]
        names = RUNNERS if wanted == "auto" else (wanted,)
        settings = [(subject, name) for subject in subjects for name in names]
        if len(settings) == 1:
            return wanted
        calls: dict[str, Callable[[], Sample]] = {}
        by_label: dict[str, tuple[Subject, str]] = {}
        for subject, name in settings:
            label = f"{str(subject.model.dtype).removeprefix('torch.')} {name}"
            self.tick(len(calls), len(settings), f"trying {label}")
            plain = DenoiseModel(subject, Plan(()), runner=name, exclusive=False)
            try:
                self.timed[0].call(plain)  # compiles
            except HastenError:
                raise
            except Exception:  # a model that cannot be compiled here is run as it is
                if name == "eager":
                    raise
                continue
            calls[label] = partial(self._one, plain)
            by_label[label] = (subject, name)
        timings = interleave(calls, rounds=CHOICE_ROUNDS, warmup=0, seed=self.seed)
        best = min(calls, key=lambda label: timings.seconds(label).median)
        self.subject, runner = by_label[best]
        return runner

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

    # -- quality -----------------------------------------------------------------------------------
    def pictures(self, name: str) -> Array:
        """(count, ...) the pictures for quality that a contender makes."""
        return np.concatenate([picture.call(self.contenders[name]) for picture in self.judged])

    def compare(self, ours: Array, original: Array) -> dict[str, Any]:
        """The quality block of a row."""
        found = {
            "psnr": self._paired(psnr(ours, original), "dB"),
            "ssim": self._paired(ssim(ours, original), ""),
        }
        if self.judge is not None:
            found["perceptual"] = self._paired(self.judge.perceptual(ours, original), "")
            found["frechet"] = {
                "value": self.judge.frechet(ours),
                "original": self.judge.frechet(original),
                "num_units": len(ours),
            }
            scores, theirs = self.judge.attributes(ours), self.judge.attributes(original)
            kept = recovery(scores, theirs, higher_is_better=True, seed=self.seed)
            entry = estimate_entry(float(np.mean(scores)), float(np.mean(theirs)), kept)
            found["attributes"] = entry | {"num_units": len(ours)}
        return found

    def _paired(self, values: Array, unit: str) -> dict[str, Any]:
        interval = bootstrap_interval(values, np.mean, seed=self.seed)
        entry = {"value": float(values.mean()), "interval": list(interval) if interval else None}
        return entry | {"num_units": len(values)} | ({"unit": unit} if unit else {})

    # -- rows --------------------------------------------------------------------------------------
    def row(
        self, name: str, timings: Timings, quality: dict[str, Any], shares: Shares, same: bool
    ) -> dict[str, Any]:
        """One row of the result."""
        model = self.contenders[name]
        plan, activity = model.plan, self.activity[name]
        loss = max((t.loss_class() for t in plan), key=list(Loss).index)
        proof = prove(loss, quality, same)
        ratio, top = timings.ratio(name), plan_ceiling(plan, shares, activity)
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
            "claims": [
                {"technique": t.name, "what": c.what, "value": c.value, "where": c.where}
                for t in plan
                for c in t.card.claims
            ],
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


def prove(loss: Loss, quality: dict[str, Any], same: bool) -> dict[str, Any]:
    """Proof that a plan keeps to its loss class."""
    decibels = quality.get("psnr", {}).get("value")
    if loss is not Loss.LOSSY:
        word = "the same" if same else "not the same"
        return {"passed": same, "detail": f"pictures are {word}, bit for bit"}
    if decibels is None:
        return {"passed": True, "detail": "lossy; no pictures were compared"}
    return {
        "passed": bool(decibels >= BROKEN_DB),
        "detail": f"lossy; {decibels:.1f} dB to the original's pictures from the same noise",
    }


def plan_ceiling(plan: Plan, shares: Shares, activity: dict[str, float]) -> Ceiling:
    """What the plan's techniques save, term by term, of the measured shares of the time."""
    savers = [t for t in plan if t.card.saves not in ("", "none")]
    if not savers:
        return ceiling("none", 0.0, 1.0, label="measured", why="saves no time by itself")
    terms: list[Term] = [technique.card.saves for technique in savers]  # type: ignore[misc]
    tops = [
        ceiling(term, shares.of(term), factor(technique, shares), label="measured")
        for technique, term in zip(savers, terms, strict=True)
    ]
    if len(tops) == 1:
        return tops[0]
    value = float(np.prod([top.value for top in tops]))
    words = ", ".join(f"{t.name}: {term}" for t, term in zip(savers, terms, strict=True))
    detail = f"product of the single ceilings ({words})"
    return Ceiling(value, terms[0], tops[0].share, "measured", detail)


def factor(technique: Technique, shares: Shares) -> float:
    """How many times cheaper the term of a technique can get at its knobs; infinite if it may vanish."""
    most = getattr(technique, "most", None)
    return float(most(shares)) if callable(most) else float("inf")


def arguments_of(pipe: Any, prompt: str, steps: int, guidance: float | None) -> dict[str, Any]:
    """The arguments with which a pipeline makes one picture of a prompt.

    Raises:
        HastenError: where a pipeline takes neither prompts nor classes.
    """
    known = inspect.signature(type(pipe).__call__).parameters
    found: dict[str, Any] = {"num_inference_steps": steps}
    if guidance is not None:
        if "guidance_scale" not in known:
            raise HastenError(
                f"{type(pipe).__name__} takes no guidance_scale; leave --guidance out."
            )
        found["guidance_scale"] = guidance
    if "prompt" in known:
        return found | {"prompt": prompt}
    if "class_labels" in known:
        return found | {"class_labels": [_class_of(pipe, prompt)]}
    raise HastenError(
        f"{type(pipe).__name__} takes neither a prompt nor class_labels, so hasten cannot call it by itself; "
        "use hasten.apply(pipe, ...) and call it with its own arguments."
    )


def usual_arguments(subject: Subject) -> dict[str, Any]:
    """The arguments that show a model of the zoo at its best, from its card; none for any other."""
    if not catalogue.is_zoo_name(subject.name):
        return {}
    return dict(catalogue.card(subject.name).get("sampling", {}))


def _class_of(pipe: Any, words: str) -> int:
    labels = getattr(pipe, "labels", None) or {}
    if words in labels:
        return int(labels[words])
    number = words if words.isdigit() else str(sum(words.encode()) % max(1, len(labels) or 1000))
    return int(number)


def bench_denoise(
    subject: Subject,
    stored: Subject | None,
    plans: list[Plan],
    limits: Limits,
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
    tick: Tick,
) -> dict[str, Any]:
    """Everything but command and pairs of a result; see `hasten.bench`.

    Args:
        stored: the subject in its checkpoint's own dtype, where that may be chosen.
    """
    judge = None if prompts else scene_judge(subject, pictures, seed)
    texts = prompts or (PLAIN_PROMPTS if judge is None else judge.prompts())
    usual = usual_arguments(subject) | dict(arguments)
    make = [
        Picture(
            usual | arguments_of(subject.pipe, texts[i % len(texts)], steps, guidance), seed + i
        )
        for i in range(max(pictures, NUM_TIMED))
    ]
    judged = make[:pictures] if quality else []
    job = DenoiseJob(subject, plans, make[:NUM_TIMED], judged, judge, seed, tick)
    chosen = job.choose_setting(stored, runner)
    job.bind(chosen, forced=runner != "auto")
    timings = job.time(rounds)
    shares = measure_shares(job.contenders[BASELINE], job.timed[0].call)
    count = len(job.contenders)
    tick(0, count, "quality: the original's pictures")
    original = job.pictures(BASELINE) if quality else None
    first = job.timed[0].call(job.contenders[BASELINE])
    rows = []
    shown = {BASELINE: _first(original, first)}
    for number, name in enumerate(job.contenders):
        if name == BASELINE:
            continue
        tick(number, count, f"quality and proof of {name}")
        again = job.timed[0].call(job.contenders[name])
        same, block, ours = np.array_equal(again, first), dict[str, Any](), None
        if original is not None:
            ours = job.pictures(name)
            block = job.compare(ours, original)
        shown[name] = _first(ours, again)
        rows.append(job.row(name, timings, block, shares, same))
    tick(count, count, "")
    return {
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "quick": timings.quick,
        "subject": job.subject.describe() | {"runner": chosen},
        "workload": {
            "prompts": len(texts),
            "steps": steps,
            "guidance": guidance,
            "pictures": pictures if quality else 0,
            "source": "held-out scenes" if judge is not None else "prompts",
        },
        "limits": limits.to_dict(),
        "baseline": job.baseline(timings, shares, limits),
        "rows": rows,
        "samples": Samples([texts[i % len(texts)] for i in range(len(shown[BASELINE]))], shown),
    }


def _first(pictures: Array | None, single: Array) -> Array:
    """The pictures that a report shows."""
    return single if pictures is None else pictures[:NUM_SHOWN]
