"""The benchmark of masked-diffusion models: static decoding, every plan, and the model they came from.

The baseline is static decoding, one place a pass, in the fastest dtype and on the fastest runner.
Beside it runs the autoregressive model of the zoo that the subject was converted from, where there
is one: the comparison that says whether masked decoding pays at all. Proofs are made in float32 on
the eager runner, since a pass over several drafts rounds differently from a pass over one text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hasten.applied import runs_on
from hasten.benchmark.choice import Setting, fastest, settings_of
from hasten.benchmark.judge import agreement_entry, estimate_entry, prove_lossy, shares_entry
from hasten.benchmark.missing import check_parts, train_parts
from hasten.benchmark.verdict import claims_of, loss_of, own_activity, verdict
from hasten.benchmark.workload import Workload, crops, make_workload
from hasten.causal.engine import CausalModel
from hasten.errors import HastenError
from hasten.masked.engine import RUNNERS, MaskedModel, block_for
from hasten.measure.ceilings import Ceiling, ceiling, reached
from hasten.measure.clock import Sample, Timings, interleave, stopwatch
from hasten.measure.limits import Limits, limits
from hasten.measure.machine import machine, versions
from hasten.measure.memory import peak_memory
from hasten.measure.parsing import parses
from hasten.measure.stats import exp_weighted_mean, recovery
from hasten.measure.text_quality import perplexity
from hasten.plan import Plan
from hasten.subject import Subject, open_subject
from hasten.technique import Loss
from hasten.zoo import catalogue

Tick = Callable[[int, int, str], None]

BASELINE = "baseline"
AUTOREGRESSIVE = "autoregressive"
PROMPT_TOKENS = 128
NUM_TEXTS = 12  # texts that are generated, and texts that are infilled, for quality
HOLE = 16  # masks in each text that is infilled


@dataclass
class Answers:
    """What one plan wrote, and how it is judged.

    Attributes:
        timed: new ids of the timed prompts.
        nll: (new,) nats of each quality text under the autoregressive model; empty without one.
        parse: whether each of them is Python, None where that cannot be said.
        right: whether each infilled token is the one that stood there.
    """

    timed: list[Tensor] = field(default_factory=list)
    nll: list[Tensor] = field(default_factory=list)
    parse: list[bool | None] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


@dataclass
class MaskedJob:
    """One benchmark of a masked model in progress."""

    subject: Subject
    work: Workload
    seed: int
    tick: Tick
    block_length: int | None = None
    contenders: dict[str, MaskedModel] = field(default_factory=dict)
    activity: dict[str, dict[str, int]] = field(default_factory=dict)
    judge: CausalModel | None = None

    @classmethod
    def start(
        cls,
        subject: Subject,
        plans: list[Plan],
        *,
        runner: str,
        prompts: list[str] | None,
        max_new_tokens: int,
        block_length: int | None,
        seed: int,
        tick: Tick,
    ) -> MaskedJob:
        """Choose what the plans are run on, and bind them, so that a wrong one is refused now."""
        work = make_workload(
            subject,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            seed=seed,
            quality=False,
            prompt_tokens=PROMPT_TOKENS,
        )
        _check_prompts(subject, work.prompts)
        job = cls(subject, work, seed, tick, block_length, judge=_origin(subject))
        forced = runner != "auto"
        job.bind([Plan(()), *plans], runner if forced else "eager", forced=forced)
        return job

    def bind(self, plans: list[Plan], runner: str, *, forced: bool) -> None:
        """Put all plans on the subject, on a runner where their techniques can run on it.

        Raises:
            PlanError: where one cannot, and the runner was `forced`.
        """
        self.contenders = {}
        for plan in plans:
            able = forced or runs_on(runner, plan)
            self.contenders[str(plan) or BASELINE] = MaskedModel(
                self.subject, plan, runner=runner if able else "eager", exclusive=False
            )

    def choose_setting(self, stored: Subject | None, wanted: str) -> str:
        """Give static decoding its best dtype and runner; returns the runner's name."""
        names = tuple(RUNNERS.kinds) if wanted == "auto" else (wanted,)
        settings = settings_of(self.subject, stored, names)
        if len(settings) == 1:
            return wanted

        def call_of(setting: Setting) -> Callable[[], Sample]:
            static = MaskedModel(setting.subject, Plan(()), runner=setting.runner, exclusive=False)
            return partial(self._timed, static, self.work.prompts[:1])

        best = fastest(settings, call_of, seed=self.seed, tick=self.tick)
        self.subject = best.subject
        return best.runner

    def _write(self, model: MaskedModel, prompt: Tensor) -> Tensor:
        """The new ids, (new,)."""
        out = model.generate(
            prompt,
            max_new_tokens=self.work.max_new_tokens,
            block_length=self.block_length,
            do_sample=False,
            eos_token_id=-1,
        )
        assert isinstance(out, Tensor)
        return out[0, prompt.shape[1] :]

    # -- speed -----------------------------------------------------------------------------------
    def time(self, rounds: int) -> Timings:
        """All contenders in turns, the autoregressive model among them."""
        calls: dict[str, Callable[[], Sample]] = {
            name: partial(self._call, name) for name in self.contenders
        }
        if self.judge is not None:
            calls[AUTOREGRESSIVE] = self._autoregressive
        return interleave(calls, rounds=rounds, warmup=1, on_tick=self.tick, seed=self.seed)

    def _call(self, name: str) -> Sample:
        model, total = self.contenders[name], Counter[str]()
        sample = self._timed(model, self.work.prompts, total)
        self.activity[name] = dict(total)
        return sample

    def _timed(
        self, model: MaskedModel, prompts: list[Tensor], activity: Counter[str] | None = None
    ) -> Sample:
        """All the prompts through one plan; what it did is added to `activity`."""
        seconds, tokens = 0.0, 0
        for prompt in prompts:
            with stopwatch(self.subject.model.device) as watch:
                tokens += self._write(model, prompt).numel()
            seconds += watch.seconds
            if activity is not None:
                activity.update(model.activity)
        return Sample(seconds, tokens)

    def _autoregressive(self) -> Sample:
        assert self.judge is not None
        seconds, tokens = 0.0, 0
        for prompt in self.work.prompts:
            with stopwatch(self.subject.model.device) as watch:
                out = self.judge.generate(
                    prompt, max_new_tokens=self.work.max_new_tokens, eos_token_id=-1
                )
            assert isinstance(out, Tensor)
            seconds += watch.seconds
            tokens += out.shape[1] - prompt.shape[1]
        return Sample(seconds, tokens)

    # -- quality -----------------------------------------------------------------------------------
    def answer(self, model: MaskedModel | CausalModel, texts: list[Tensor]) -> Answers:
        """Run a plan over the timed prompts, and over texts for quality.

        Args:
            texts: ids (1, PROMPT_TOKENS + new) of held-out text each; their ends are rewritten.
        """
        found, tokenizer = Answers(), self.subject.tokenizer
        infiller = None
        if isinstance(model, MaskedModel):
            found.timed = [self._write(model, prompt) for prompt in self.work.prompts]
            # Holes make passes of other sizes, which nobody times: no graphs for them.
            infiller = MaskedModel(self.subject, model.plan, exclusive=False)
        for text in texts:
            prompt = text[:, :PROMPT_TOKENS]
            new = self._continued(model, prompt)[None]
            if self.judge is not None:
                found.nll.append(_nll(self.judge, prompt, new))
            if tokenizer is not None:
                before = str(tokenizer.decode(prompt[0]))
                whole = before + str(tokenizer.decode(new[0]))
                found.parse.append(parses(whole, prompt_chars=len(before)))
            if infiller is not None:
                found.right += self._infilled(infiller, text)
        return found

    def _continued(self, model: MaskedModel | CausalModel, prompt: Tensor) -> Tensor:
        if isinstance(model, MaskedModel):
            return self._write(model, prompt)
        out = model.generate(
            prompt, max_new_tokens=self.work.max_new_tokens, do_sample=False, eos_token_id=-1
        )
        assert isinstance(out, Tensor)
        return out[0, prompt.shape[1] :]

    def _infilled(self, model: MaskedModel, text: Tensor) -> list[bool]:
        """Fill a hole in the middle of a text (1, length), and compare with what stood there."""
        start = (text.shape[1] - HOLE) // 2
        hole = slice(start, start + HOLE)
        masked = text.clone()
        masked[:, hole] = model.form.mask_id
        return list((model.infill(masked)[0, hole] == text[0, hole]).tolist())

    def row(
        self,
        name: str,
        timings: Timings,
        ours: Answers,
        original: Answers,
        exact: tuple[bool, str] | None,
    ) -> dict[str, Any]:
        """One row of the result."""
        model = self.contenders[name]
        plan = model.plan
        loss = loss_of(plan)
        quality = compare(ours, original, self.seed)
        if exact is not None:
            proof = {"passed": exact[0], "detail": exact[1]}
        else:
            proof = prove_lossy(quality)
        activity = {key: float(value) for key, value in self.activity[name].items()}
        ratio, top = timings.ratio(name), plan_ceiling(plan, self.work.max_new_tokens)
        word, reason = verdict(plan, ratio, activity, proof, top)
        with peak_memory(self.subject.model.device) as peak:
            self._write(model, self.work.prompts[0])
        loop = {key: activity[key] for key in ("passes", "positions", "emitted")}
        return {
            "plan": name,
            "runner": model.runner.name,
            "ratio": ratio.to_dict(),
            "tokens_per_second": timings.tokens_per_second(name).to_dict(),
            "passes_ratio": self.activity[BASELINE]["passes"] / max(1.0, activity["passes"]),
            "ceiling": top.value,
            "ceiling_detail": top.to_dict(),
            "reached": reached(ratio.median, top),
            "activity": own_activity(plan, activity) | loop,
            "loss_class": loss.value,
            "proof": proof,
            "quality": quality,
            "peak_bytes": int(peak.bytes),
            "cache_bytes": model.peak_cache_bytes,
            "verdict": word,
            "reason": reason,
            "claims": claims_of(plan),
        }

    def baseline(
        self, timings: Timings, texts: list[Tensor], original: Answers, limits: Limits
    ) -> dict[str, Any]:
        """Static decoding, and the autoregressive model beside it."""
        static = self.contenders[BASELINE]
        with peak_memory(self.subject.model.device) as peak:
            self._write(static, self.work.prompts[0])
        seconds = timings.seconds(BASELINE).median
        # A pass is bound by arithmetic: two operations for each weight and position.
        work = 2.0 * self.subject.num_parameters * self.activity[BASELINE]["positions"]
        dtype = "bf16" if self.subject.model.dtype == torch.bfloat16 else "fp32"
        found: dict[str, Any] = {
            "runner": static.runner.name,
            "decoding": "static: one place a pass, the most confident first",
            "tokens_per_second": timings.tokens_per_second(BASELINE).to_dict(),
            "limit_fraction": limits.fraction_of_limit(
                flops_per_second=work / seconds, dtype=dtype
            ),
            "passes": self.activity[BASELINE]["passes"],
            "peak_bytes": int(peak.bytes),
            "cache_bytes": static.peak_cache_bytes,
        }
        if self.judge is not None:
            beside = compare(self.answer(self.judge, texts), original, self.seed) if texts else {}
            found[AUTOREGRESSIVE] = {
                "model": self.judge.subject.name,
                "tokens_per_second": timings.tokens_per_second(AUTOREGRESSIVE).to_dict(),
                "ratio": timings.ratio(AUTOREGRESSIVE).to_dict(),
                "quality": beside,
            }
        return found

    def prove(self, name: str) -> tuple[bool, str] | None:
        """Whether an exact plan writes what static decoding writes, in float32; None if it is lossy."""
        plan = self.contenders[name].plan
        if any(t.loss_class() is Loss.LOSSY for t in plan):
            return None
        subject = self.subject
        if subject.model.dtype != torch.float32:
            subject = open_subject(subject.name, dtype="float32")
        models = [MaskedModel(subject, p, exclusive=False) for p in (plan, Plan(()))]
        same = [
            torch.equal(*(self._write(model, prompt) for model in models))
            for prompt in self.work.prompts
        ]
        tokens = len(same) * self.work.max_new_tokens
        if all(same):
            return (
                True,
                f"ids equal to static decoding in float32 on all {len(same)} prompts ({tokens} tokens)",
            )
        return (
            False,
            f"ids differ from static decoding on {same.count(False)} of {len(same)} prompts",
        )


def compare(ours: Answers, original: Answers, seed: int) -> dict[str, Any]:
    """The quality block of a row, each figure beside that of static decoding."""
    quality: dict[str, Any] = {}
    if original.nll:
        estimate = recovery(
            [float(nll.mean()) for nll in ours.nll],
            [float(nll.mean()) for nll in original.nll],
            higher_is_better=False,
            weights=[float(nll.numel()) for nll in original.nll],
            aggregate=exp_weighted_mean,
            seed=seed,
        )
        quality["perplexity"] = estimate_entry(
            perplexity(torch.cat(ours.nll)), perplexity(torch.cat(original.nll)), estimate
        )
    judged = [
        (a, b)
        for a, b in zip(ours.parse, original.parse, strict=True)
        if a is not None and b is not None
    ]
    if judged:
        quality["parse"] = shares_entry([a for a, _ in judged], [b for _, b in judged], seed)
    if original.right and ours.right:
        quality["infilling"] = shares_entry(ours.right, original.right, seed)
    if ours.timed:
        quality["agreement"] = agreement_entry(ours.timed, original.timed)
    return quality


def plan_ceiling(plan: Plan, new_tokens: int) -> Ceiling:
    """Every pass is decoding, so fewer passes and fewer positions a pass save all there is."""
    factor = 1.0
    for technique in plan:
        if technique.card.saves == "passes":
            factor *= min(float(technique.knobs.get("num_draft", new_tokens)), float(new_tokens))
    saves = any(t.card.saves == "passes" for t in plan)
    if not saves:
        return ceiling(
            "none", 0.0, 1.0, label="modelled", why="it saves positions of a pass, not passes"
        )
    return ceiling("passes", 1.0, factor, label="modelled")


def bench_masked(
    subject: Subject,
    stored: Subject | None,
    plans: list[Plan],
    *,
    runner: str,
    prompts: list[str] | None,
    max_new_tokens: int,
    block_length: int | None,
    rounds: int,
    quality: bool,
    seed: int,
    train: bool,
    tick: Tick,
) -> dict[str, Any]:
    """Everything but command and pairs of a result; see `hasten.bench`.

    Args:
        stored: the subject in its checkpoint's own dtype, where that may be chosen.
        runner: as `hasten.bench`.
        block_length: as `MaskedModel.generate`.
        train: train parts that are missing.
    """
    block_length = block_for(subject, max_new_tokens, block_length)
    if not train:
        check_parts(subject, plans)
    train_parts(subject, plans, seed=seed, tick=tick)
    job = MaskedJob.start(
        subject,
        plans,
        runner=runner,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        seed=seed,
        tick=tick,
    )
    machine_limits = limits(on_tick=tick)  # takes seconds, so after all that may be refused
    chosen = job.choose_setting(stored, runner)
    job.bind([Plan(()), *plans], chosen, forced=runner != "auto")
    timings = job.time(rounds)
    texts = _texts(job.subject, max_new_tokens, seed) if quality else []
    steps = len(job.contenders) + 1
    tick(0, steps, "quality: static decoding")
    original = job.answer(job.contenders[BASELINE], texts)
    rows = []
    for step, name in enumerate(job.contenders):
        if name == BASELINE:
            continue
        tick(step, steps, f"quality and proof of {name}")
        ours = job.answer(job.contenders[name], texts)
        rows.append(job.row(name, timings, ours, original, job.prove(name)))
    tick(steps, steps, "")
    return {
        "machine": machine(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "quick": timings.quick,
        "subject": job.subject.describe() | {"runner": chosen},
        "workload": {
            "prompts": len(job.work.prompts),
            "prompt_tokens": [int(p.shape[1]) for p in job.work.prompts],
            "max_new_tokens": max_new_tokens,
            "block_length": job.block_length,
            "source": job.work.source,
            "passages": len(texts),
            "retrievals": 0,
        },
        "limits": machine_limits.to_dict(),
        "baseline": job.baseline(timings, texts, original, machine_limits),
        "rows": rows,
    }


def _check_prompts(subject: Subject, prompts: list[Tensor]) -> None:
    """Refuse a prompt with masks before anything is measured; a benchmark continues texts."""
    assert subject.form is not None
    mask_id = subject.form.mask_id
    if any(bool((prompt == mask_id).any()) for prompt in prompts):
        raise HastenError(
            f"A prompt holds the mask (id {mask_id}), and a benchmark continues prompts; give a text "
            "without it."
        )


def _texts(subject: Subject, new_tokens: int, seed: int) -> list[Tensor]:
    """Held-out passages (1, PROMPT_TOKENS + new) to be continued and infilled."""
    if subject.tokenizer is None:
        return []
    return crops(subject, NUM_TEXTS, PROMPT_TOKENS + new_tokens, seed)


def _origin(subject: Subject) -> CausalModel | None:
    """The autoregressive model of the zoo that a zoo model was converted from."""
    if not catalogue.is_zoo_name(subject.name):
        return None
    base = catalogue.card(subject.name).get("recipe", {}).get("base")
    if base is None:
        return None
    return CausalModel(open_subject(base), Plan(()), exclusive=False)


def _nll(judge: CausalModel, prompt: Tensor, new: Tensor) -> Tensor:
    """Nats (new,) of each new id under the judge, in one pass."""
    ids = torch.cat((prompt, new), dim=1)
    with torch.no_grad():
        logits = judge.subject.model(ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    if int(new.max()) >= logits.shape[1]:
        raise HastenError("the text holds an id that the autoregressive model does not know")
    return -logits.float().log_softmax(dim=-1).gather(1, new[0, :, None])[:, 0]
