"""Quality of a plan beside the original, on the same prompts and seeds; and the proof of its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.benchmark.workload import Workload
from hasten.causal.engine import CausalModel
from hasten.measure.parsing import parses
from hasten.measure.retrieval import retrieved
from hasten.measure.stats import (
    exp_weighted_mean,
    recovery,
    recovery_of_shares,
    two_sample_test,
    weighted_mean,
)
from hasten.measure.text_quality import agreement, bits_per_byte, kl_divergence, perplexity
from hasten.technique import Loss

Tick = Callable[[], None]

RETRIEVAL_TOKENS = 12
SAMPLED_CALLS = 300  # calls a side for the test of a sampling distribution
SAMPLED_TOKENS = 2
MIN_RECOVERY = 0.5  # a lossy plan that keeps less of the perplexity than this is broken


@dataclass
class Answers:
    """What one plan did on a workload: everything that quality is computed from."""

    ids: list[Tensor] = field(default_factory=list)  # new ids of each prompt, greedy
    nll: list[Tensor] = field(default_factory=list)  # (length,) nats of each passage
    logits: list[Tensor] = field(default_factory=list)  # (length, vocabulary), half precision
    texts: list[tuple[str, int]] = field(
        default_factory=list
    )  # prompt + continuation, prompt chars
    recalled: list[bool] = field(default_factory=list)


def answer(model: CausalModel, work: Workload, tick: Tick) -> Answers:
    """Run a plan over the workload's prompts, passages and retrievals."""
    found = Answers()
    tokenizer = model.subject.tokenizer
    for prompt in work.prompts:
        out = model.generate(prompt, max_new_tokens=work.max_new_tokens, do_sample=False)
        assert isinstance(out, Tensor)
        found.ids.append(out[0, prompt.shape[1] :])
        if tokenizer is not None:
            before = str(tokenizer.decode(prompt[0]))
            found.texts.append((before + str(tokenizer.decode(found.ids[-1])), len(before)))
        tick()
    for passage in work.passages:
        score = model.score(passage.prompt, passage.continuation, logits=True)
        assert score.logits is not None
        found.nll.append(score.nll[0])
        found.logits.append(score.logits[0])
        tick()
    if tokenizer is None:
        return found
    for item in work.retrievals:
        ids = torch.tensor([tokenizer(item.prompt, add_special_tokens=False)["input_ids"]])
        limit = (model.subject.context or 4096) - RETRIEVAL_TOKENS
        ids = ids[:, -limit:].to(model.subject.model.device)
        out = model.generate(ids, max_new_tokens=RETRIEVAL_TOKENS, do_sample=False)
        assert isinstance(out, Tensor)
        found.recalled.append(retrieved(item, str(tokenizer.decode(out[0, ids.shape[1] :]))))
        tick()
    return found


def compare(ours: Answers, original: Answers, work: Workload, seed: int) -> dict[str, Any]:
    """The quality block of a row: each metric with its value, the original's, and the recovery."""
    quality: dict[str, Any] = {}
    if original.nll:
        quality |= _likelihood(ours, original, work, seed)
    quality["agreement"] = agreement_entry(ours.ids, original.ids)
    if original.texts:
        answers = [
            (parses(a, prompt_chars=n), parses(b, prompt_chars=m))
            for (a, n), (b, m) in zip(ours.texts, original.texts, strict=True)
        ]
        judged = [(a, b) for a, b in answers if a is not None and b is not None]
        if judged:
            quality["parse"] = shares_entry([a for a, _ in judged], [b for _, b in judged], seed)
    if original.recalled:
        quality["retrieval"] = shares_entry(ours.recalled, original.recalled, seed)
    return quality


def _likelihood(ours: Answers, original: Answers, work: Workload, seed: int) -> dict[str, Any]:
    lengths = [float(nll.numel()) for nll in original.nll]
    num_bytes = [float(p.num_bytes) for p in work.passages]
    mean_ours = [float(nll.double().mean()) for nll in ours.nll]
    mean_theirs = [float(nll.double().mean()) for nll in original.nll]
    estimate = recovery(
        mean_ours, mean_theirs, higher_is_better=False,
        weights=lengths, aggregate=exp_weighted_mean, seed=seed,
    )  # fmt: skip
    total = [float(nll.double().sum()) for nll in ours.nll]
    total_theirs = [float(nll.double().sum()) for nll in original.nll]
    per_byte = recovery(
        [t / b for t, b in zip(total, num_bytes, strict=True)],
        [t / b for t, b in zip(total_theirs, num_bytes, strict=True)],
        higher_is_better=False, weights=num_bytes, aggregate=weighted_mean, seed=seed,
    )  # fmt: skip
    kl = torch.cat([kl_divergence(b, a) for a, b in zip(ours.logits, original.logits, strict=True)])
    return {
        "perplexity": estimate_entry(
            perplexity(torch.cat(ours.nll)), perplexity(torch.cat(original.nll)), estimate
        ),
        "bits_per_byte": estimate_entry(
            bits_per_byte(sum(total), int(sum(num_bytes))),
            bits_per_byte(sum(total_theirs), int(sum(num_bytes))),
            per_byte,
        ),
        "kl": {
            "value": float(kl.mean()),
            "original": 0.0,
            "unit": "nats a token",
            "num_units": kl.numel(),
        },
    }


def agreement_entry(ours: list[Tensor], theirs: list[Tensor]) -> dict[str, Any]:
    """How many ids of each prompt are the original's, and where the first one is not."""
    pairs = [agreement(a, b) for a, b in zip(ours, theirs, strict=True)]
    firsts = [p.first_divergence for p in pairs if p.first_divergence is not None]
    return {
        "value": sum(p.share for p in pairs) / len(pairs),
        "original": 1.0,
        "identical": sum(p.identical for p in pairs),
        "num_units": len(pairs),
        "first_divergence": min(firsts, default=None),
    }


def shares_entry(ours: list[bool], theirs: list[bool], seed: int) -> dict[str, Any]:
    """A share of yes/no units beside the original's, paired."""
    estimate = recovery_of_shares(ours, theirs, seed=seed)
    return estimate_entry(sum(ours) / len(ours), sum(theirs) / len(theirs), estimate) | {
        "num_units": len(ours)
    }


def estimate_entry(value: float, original: float, estimate: Any) -> dict[str, Any]:
    """A metric with the original's value and how much of it is kept."""
    return {
        "value": value,
        "original": original,
        "recovery": None if estimate is None else estimate.value,
        "interval": None
        if estimate is None or estimate.interval is None
        else list(estimate.interval),
    }


def prove(
    loss: Loss,
    model: CausalModel,
    original: CausalModel,
    ours: Answers,
    theirs: Answers,
    quality: dict[str, Any],
    work: Workload,
    tick: Tick,
) -> dict[str, Any]:
    """Proof that a plan keeps to its loss class: {"passed": bool, "detail": what was shown}."""
    if loss is Loss.LOSSY:
        return prove_lossy(quality)
    passed, detail = prove_ids(original, ours, theirs, work)
    if not passed or loss is Loss.EXACT:
        return {"passed": passed, "detail": detail}
    test = _sampling_test(model, original, work, tick)
    word = "indistinguishable" if test.passes() else "different"
    return {
        "passed": test.passes(),
        "detail": f"{detail}; {SAMPLED_CALLS} sampled continuations a side are {word} (p = {test.p_value:.3g})",
    }


def prove_ids(
    original: CausalModel, ours: Answers, theirs: Answers, work: Workload
) -> tuple[bool, str]:
    """Whether greedy ids are the original's own, up to ties that rounding decides.

    In float32 they must be equal. A narrower dtype rounds differently for each width of a pass, so
    that two tokens may change places which are closer than that; there each of our tokens must be
    as likely to the original as its likeliest one, but for this rounding, which is measured.
    """
    pairs = [agreement(a, b) for a, b in zip(ours.ids, theirs.ids, strict=True)]
    different = [i for i, p in enumerate(pairs) if not p.identical]
    if not different:
        total = sum(p.length_b for p in pairs)
        return True, f"greedy ids equal on all {len(pairs)} prompts ({total} tokens)"
    first = pairs[different[0]].first_divergence
    words = f"greedy ids differ on {len(different)} of {len(pairs)} prompts, first at token {first}"
    model = original.subject.model
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype == "float32" or any(pairs[i].length_a != pairs[i].length_b for i in different):
        return False, words
    rounding = max(_rounding(original, work.prompts[i], theirs.ids[i]) for i in different)
    short = max(_shortfall(model, work.prompts[i], ours.ids[i]) for i in different)
    tie = short <= 2 * rounding  # what we compare with is rounded as well
    return tie, (
        f"{words}; each of their tokens is within {short:.3g} of the likeliest one's logit, "
        f"and {dtype} moves such distances by up to {rounding:.3g}: "
        f"{'a tie' if tie else 'more than a tie'}"
    )


def _rounding(original: CausalModel, prompt: Tensor, ids: Tensor) -> float:
    """How far rounding moves the distance of the two likeliest tokens' logits, at most.

    The original's own tokens `ids` (length,) are run one by one and all at once.
    """
    single = original.score(prompt, ids[None], logits=True).logits
    assert single is not None
    best = single[0].topk(2, dim=-1).indices
    apart = [x.gather(1, best) for x in (single[0], _logits(original.subject.model, prompt, ids))]
    distances = [x[:, 0] - x[:, 1] for x in apart]
    return float((distances[0] - distances[1]).abs().max())


def _shortfall(model: Any, prompt: Tensor, ids: Tensor) -> float:
    """How far the logit of any of `ids` (length,) lies below the largest, at most."""
    logits = _logits(model, prompt, ids)
    return float((logits.max(dim=-1).values - logits.gather(1, ids[:, None])[:, 0]).max())


@torch.no_grad()
def _logits(model: Any, prompt: Tensor, ids: Tensor) -> Tensor:
    """The original's logits (length, vocabulary) for each of `ids` (length,), from one pass."""
    sequence = torch.cat((prompt, ids[None]), dim=1)
    logits: Tensor = model(sequence, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    return logits.float()


def _sampling_test(model: CausalModel, original: CausalModel, work: Workload, tick: Tick) -> Any:
    """Two-sample test over short sampled continuations of one prompt, where outcomes repeat."""
    prompt = work.prompts[0][:, -64:]
    counts: list[Counter[tuple[int, ...]]] = []
    for side, seeds in ((model, 0), (original, SAMPLED_CALLS)):
        seen: Counter[tuple[int, ...]] = Counter()
        for call in range(SAMPLED_CALLS):
            out = side.generate(
                prompt,
                max_new_tokens=SAMPLED_TOKENS + 1,
                do_sample=True,
                top_k=8,
                seed=seeds + call,
            )
            assert isinstance(out, Tensor)
            seen[tuple(out[0, prompt.shape[1] :].tolist())] += 1
        counts.append(seen)
        tick()
    outcomes = sorted(set(counts[0]) | set(counts[1]))
    return two_sample_test([counts[0][o] for o in outcomes], [counts[1][o] for o in outcomes])


def prove_lossy(quality: dict[str, Any]) -> dict[str, Any]:
    """A lossy plan is broken only where next to nothing of the quality is left."""
    found = quality.get("perplexity")
    if found is None or found["recovery"] is None:
        share = quality["agreement"]["value"]
        return {
            "passed": True,
            "detail": f"lossy; {share:.0%} of the ids agree (no text to judge by)",
        }
    low = found["interval"][0] if found["interval"] else found["recovery"]
    return {
        "passed": bool(found["recovery"] >= MIN_RECOVERY),
        "detail": f"lossy; keeps {found['recovery']:.1%} of the perplexity, at least {low:.1%}",
    }
