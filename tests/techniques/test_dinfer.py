"""dInfer: commit rules, credit, the vicinity cache and smoothing, each against its definition."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten.causal.generation import Settings
from hasten.errors import PlanError
from hasten.masked.committer.credit import Credit
from hasten.masked.committer.dinfer import DInfer
from hasten.masked.committer.parallel import best_of_stretches
from hasten.masked.denoiser import Denoiser
from hasten.masked.engine import MaskedModel
from hasten.masked.run import Run
from hasten.masked.runners import Said
from hasten.masked.sampling import Sampler
from hasten.plan import Plan
from hasten.technique import Slot
from tests import models
from tests.techniques.fillers import MASK, NEVER, filler, prompt, record
from tests.techniques.stale import Stale

BARE = "cache=none, smoothing=false"
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def steps(plan: str, **arguments: Any) -> tuple[Tensor, Run]:
    """The text and the run of a plan on a model that is sure of some places."""
    with hasten.apply(filler(sharp=8.0), *([plan] if plan else [])) as fast:
        run = record(fast, prompt(3), **arguments).run
    return run.sequences(), run


# ------------------------------------------------------------------- all of it, place by place
Span = tuple[int, int] | None


def reference(
    model: PreTrainedModel,
    ids: list[int],
    new: int,
    block: int,
    *,
    sampler: Sampler | None = None,
    **knobs: Any,
) -> tuple[list[list[int]], list[Tensor], list[Span]]:
    """One row by the sheet's steps: the text after each pass, what the pass said, what it computed.

    Returns:
        Texts; logits (block, vocabulary) with credit; first and last position, None for all.
    """
    k = {**DInfer().knobs, **knobs}
    table, stale = model.get_input_embeddings().weight.detach(), Stale(model)
    text = [*ids, *[MASK] * new]
    length, step, last_full = len(text), 0, 0
    beliefs: dict[int, Tensor] = {}
    texts, said, computed = [], [], []
    for start in range(len(ids), length, block):
        end, credit, anew = start + block, torch.zeros(block, len(table)), True
        while MASK in text[start:end]:
            period = k["cache_update_freq"]
            span: Span = (max(0, start - max(k["prefix_look"], model.config.shifted_logits)),
                          length if k["cache"] == "prefix" else min(length, end + k["after_look"]))  # fmt: skip
            if (k["cache"] == "none" or step < k["warmup_steps"] or anew
                    or (period and step - last_full >= period)):  # fmt: skip
                span, last_full = None, step
            read = table[text].clone()
            share = k["smoothing_start"] + k["smoothing_growth"] * (step - 1)
            for place, chances in beliefs.items() if k["smoothing"] else ():
                if text[place] == MASK:
                    read[place] += min(share, k["smoothing_limit"]) * (chances.double() @ table)
            rows = None if span is None else range(*span)
            logits = stale.logits(torch.tensor([text]), rows, read[None])[0, start:end]
            beliefs = {start + i: logits[i].softmax(-1) for i in range(block)}
            masked = [p for p in range(start, end) if text[p] == MASK]
            if k["decoder"] == "credit":
                credit *= 1.0 if anew else k["credit_decay"]
                for p in masked:
                    chance, token = logits[p - start].softmax(-1).max(-1)
                    credit[p - start, token] += chance ** k["credit_power"]
                logits = logits + k["credit_weight"] * torch.log(1 + credit)
            drawn = logits.argmax(-1)
            if sampler is not None:
                wanted = torch.arange(start, end)
                drawn = sampler.best(logits[None], torch.tensor([text]), wanted, MASK)[0]
            sure = {p: float(logits[p - start].softmax(-1)[drawn[p - start]]) for p in masked}
            theta = k["threshold"]
            if k["smoothing"] and k["threshold_decay"]:
                theta = max(1 - k["threshold_decay"] * step, theta)
            chosen = {p for p in masked if sure[p] >= theta}
            chosen.add(max(masked, key=lambda p: (sure[p], -p)))
            if k["decoder"] == "hierarchical":
                stretch: list[int] = []
                for p in [*masked, length + 1]:  # the last one only ends the last stretch
                    if stretch and p != stretch[-1] + 1:
                        best = max(stretch, key=lambda q: (sure[q], -q))
                        chosen |= {best} if sure[best] > k["low_threshold"] else set()
                        stretch = []
                    stretch.append(p)
            for p in chosen:
                text[p] = int(drawn[p - start])
            texts.append(list(text))
            said.append(logits)
            computed.append(span)
            step, anew = step + 1, False
    return texts, said, computed


WHOLE = [
    {},  # the defaults
    {"decoder": "threshold", "cache": "none", "smoothing": False, "threshold": 0.6},
    {"cache": "none", "smoothing": False, "threshold": 0.7, "low_threshold": 0.2},
    {"decoder": "credit", "cache": "none", "smoothing": False, "threshold": 0.8},
    {"decoder": "credit", "threshold": 0.7, "warmup_steps": 1, "after_look": 3, "prefix_look": 0},
    {"decoder": "threshold", "cache": "prefix", "warmup_steps": 0, "prefix_look": 2},
    {"low_threshold": 0.2, "warmup_steps": 2, "prefix_look": 3, "after_look": 4,
     "cache_update_freq": 3, "threshold_decay": 0.05},
    {"decoder": "none", "smoothing": False, "warmup_steps": 3, "cache_update_freq": 4,
     "prefix_look": 0, "after_look": 0, "threshold": 2.0},
]  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [{}, {"shifted": True}, {"block_length": 8}, {"shifted": True, "block_length": 12}],
    ids=str,
)
@pytest.mark.parametrize("knobs", WHOLE, ids=str)
def test_every_pass_is_the_sheets(
    knobs: dict[str, Any], form: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beliefs are handed on from pass to pass, and rounding would be with them.
    model, found = filler(sharp=8.0, dtype=torch.float64, **form), []
    read = Denoiser.read

    def noted_read(self: Any, *args: Any, rows: Tensor | None = None, **more: Any) -> Said:
        found.append(None if rows is None else (int(rows[0]), int(rows[-1]) + 1))
        return read(self, *args, rows=rows, **more)

    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 0, "seed": 2}
    for arguments in ({}, drawn):
        found.clear()
        with monkeypatch.context() as patch, hasten.apply(model, DInfer(**knobs)) as fast:
            patch.setattr(Denoiser, "read", noted_read)
            noted = record(fast, prompt(1), new=32, block=16, **arguments)
        settings = Settings.resolve(model, 1, {"max_new_tokens": 1, **arguments})
        texts, said, computed = reference(
            model, prompt(1)[0].tolist(), 32, 16, sampler=Sampler(settings, 1), **knobs
        )
        assert [text[0].tolist() for text in noted.after] == texts
        assert found == computed
        for guess, expected in zip(noted.guesses, said, strict=True):
            torch.testing.assert_close(guess.logits[0], expected, rtol=0, atol=1e-4)
            ours, best = guess.logits[0].softmax(-1), guess.tokens[0, guess.wanted]
            chances = ours.gather(1, best[:, None])[:, 0]  # whatever the temperature
            torch.testing.assert_close(
                guess.confidence[0, guess.wanted], chances, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("decoder", ["threshold", "hierarchical", "credit"])
@pytest.mark.parametrize("cache", ["none", "dual", "prefix"])
def test_a_row_of_a_batch_is_what_it_is_alone_but_for_what_counts_passes(
    decoder: str, cache: str
) -> None:
    """Rows whose block is full wait for the others, and nothing of them changes meanwhile."""
    rows = [prompt(1, n, seed=n)[0] for n in (12, 7, 3)]
    knobs = f"decoder={decoder}, cache={cache}, smoothing=false, warmup_steps=0, threshold=0.7"
    knobs += ", low_threshold=0.2, prefix_look=3, after_look=3"
    batch = models.padded(rows)
    with hasten.apply(filler(sharp=8.0), f"dinfer({knobs})") as fast:
        noted = record(fast, batch["input_ids"], 24, mask=batch["attention_mask"], block=8)
        for row, ids in zip(noted.run.sequences(), rows, strict=True):
            alone = record(fast, ids[None], 24, block=8).run
            assert torch.equal(row[12:], alone.sequences()[0, ids.numel() :])
        waited = 0
        for before, after in zip(noted.before, noted.after, strict=True):
            first = int((before == MASK).any(dim=0).float().argmax())
            end = first + 8 - (first - 12) % 8  # of the block in hand
            full = (before[:, :end] != MASK).all(dim=1)
            assert torch.equal(before[full], after[full])
            waited += int(full.sum())
        assert waited > 0


@pytest.mark.parametrize("decoder", ["threshold", "hierarchical", "credit"])
def test_the_mask_itself_is_never_fixed(decoder: str) -> None:
    """Not by a model to which it is the likeliest token everywhere, either."""
    model = filler(sharp=8.0)
    lifted = model.lm_head.weight.detach()
    lifted[MASK] = 0.0
    model.lm_head.register_forward_hook(
        lambda module, inputs, out: out + 50.0 * torch.nn.functional.one_hot(
            torch.tensor(MASK), out.shape[-1])
    )  # fmt: skip
    with torch.no_grad():
        assert bool((model(prompt(1)).logits.argmax(-1) == MASK).all())
    with hasten.apply(model, f"dinfer(decoder={decoder}, warmup_steps=0)") as fast:
        out = fast.generate(prompt(2), max_new_tokens=16, block_length=8, **NEVER)
    assert not bool((out == MASK).any())


def test_confidence_is_that_of_float32_logits() -> None:
    with hasten.apply(filler(sharp=8.0, dtype=torch.bfloat16), f"dinfer({BARE})") as fast:
        noted = record(fast, prompt(2), new=8)
    for guess in noted.guesses:
        assert guess.logits.dtype == guess.confidence.dtype == torch.float32
        sums = guess.logits.exp().sum(-1)
        by_hand = guess.logits.max(-1).values.exp() / sums
        torch.testing.assert_close(guess.confidence[:, guess.wanted], by_hand)


# ------------------------------------------------------------------------------------ committers
@pytest.mark.parametrize("decoder", ["threshold", "hierarchical", "credit"])
def test_a_threshold_above_one_fixes_one_place_a_pass(decoder: str) -> None:
    knobs = f"decoder={decoder}, threshold=1.5, low_threshold=1.5, credit_weight=0, {BARE}"
    text, run = steps(f"dinfer({knobs})", block=12)
    expected, _ = steps("", block=12)
    assert torch.equal(text, expected)
    assert run.activity["passes"] == 24
    assert not [key for key in run.activity if key.startswith("dinfer")]


def test_credit_that_lifts_nothing_is_the_threshold_decoder() -> None:
    text, run = steps(f"dinfer(decoder=threshold, threshold=0.8, {BARE})")
    for decoder in ("dinfer(decoder=credit, credit_weight=0, threshold=0.8, {})",
                    "confidence_threshold(threshold=0.8)"):  # fmt: skip
        same, other = steps(decoder.format(BARE))
        assert torch.equal(same, text)
        assert other.activity["passes"] == run.activity["passes"]
        assert all(
            torch.equal(*pair) for pair in zip(run.trace or [], other.trace or [], strict=True)
        )


def test_credit_grows_fades_and_lifts_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((3, 2, 5, 11), generator=generator)
    masked = torch.rand((3, 2, 5), generator=generator) < 0.7
    credit = Credit(0.7, 0.8, 0.2)
    matrix = torch.zeros(2, 5, 11)
    for step in range(3):
        fused = credit.fuse(logits[step], masked[step], key="block")
        if step:
            matrix = matrix * 0.8
        for row in range(2):
            for place in range(5):
                if masked[step, row, place]:
                    best = logits[step, row, place].softmax(0).max(0)
                    matrix[row, place, best.indices] += best.values**0.2
        torch.testing.assert_close(fused, logits[step] + 0.7 * torch.log(1 + matrix))
    anew = credit.fuse(logits[0], masked[0], key="next block")
    assert torch.equal(anew, Credit(0.7, 0.8, 0.2).fuse(logits[0], masked[0], key="block"))


def test_credit_lets_favourites_through_earlier() -> None:
    _, plain = steps(f"dinfer(decoder=threshold, threshold=0.9, {BARE})")
    _, credit = steps(f"dinfer(decoder=credit, threshold=0.9, {BARE})")
    assert credit.activity["passes"] < plain.activity["passes"]


def test_the_best_of_each_stretch_is_found() -> None:
    places = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0, 0]]).bool()
    sure = torch.tensor([[2, 3, 9, 1, 9, 9, 4, 5, 5], [9, 9, 0, 0, 0, 0, 9, 9, 9]]) / 10
    assert best_of_stretches(sure, places).nonzero().tolist() == [[0, 1], [0, 3], [0, 7], [1, 2]]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        places = torch.rand((3, 17), generator=generator) < 0.6
        sure = torch.randint(0, 4, (3, 17), generator=generator) / 4
        expected = torch.zeros_like(places)
        for row in range(3):
            edges = [-1, *(~places[row]).nonzero()[:, 0].tolist(), 17]
            for before, after in pairwise(edges):
                if after - before > 1:
                    inside = sure[row, before + 1 : after]
                    expected[row, before + 1 + int(inside.argmax())] = True
        assert torch.equal(best_of_stretches(sure, places), expected)


def test_doubtful_places_are_fixed_apart_from_each_other() -> None:
    with hasten.apply(
        filler(sharp=8.0), f"dinfer(threshold=0.9, low_threshold=0.3, {BARE})"
    ) as fast:
        noted = record(fast, prompt(4), new=32, block=32)
    doubtful = 0
    for before, after, guess in zip(noted.before, noted.after, noted.guesses, strict=True):
        for row in range(4):
            fixed = ((before[row] == MASK) & (after[row] != MASK)).nonzero()[:, 0]
            low = [int(p) for p in fixed if guess.confidence[row, p] < 0.9]
            doubtful += len(low)
            for first, second in pairwise(low):
                between = before[row, first : second + 1]
                assert bool((between != MASK).any()), "two doubtful places of one stretch"
    assert doubtful > len(noted.before) * 2
    _, plain = steps(f"dinfer(decoder=threshold, threshold=0.9, {BARE})", new=32, block=32)
    assert noted.run.activity["passes"] < plain.activity["passes"]


# ------------------------------------------------------------------------------------------ cache
def logits_along(
    fast: MaskedModel, texts: list[Tensor], blocks: list[tuple[int, int]], **inputs: Any
) -> list[Tensor]:
    """What the model says of the blocks of given texts, pass after pass, through the plan's cache."""
    run, _ = fast._generation(inputs["ids"], inputs.get("mask"), inputs["block"], {
        "max_new_tokens": inputs["new"], **NEVER})  # fmt: skip
    for technique, bound in run.slots.entries():
        run.states[id(technique)] = technique.begin(run, bound)
    said = []
    for text, block in zip(texts, blocks, strict=True):
        run.tokens, run.block = text, block
        said.append(run.look().logits)
    return said


def static_course(new: int, block: int, batch: dict[str, Tensor], **form: Any) -> Any:
    """Model, texts and blocks of static decoding."""
    model = filler(**form)
    with hasten.apply(model) as fast:
        run = record(fast, batch["input_ids"], new, mask=batch.get("attention_mask"), block=block)
    start = batch["input_ids"].shape[1]
    blocks = [(start + i // block * block, start + (i // block + 1) * block) for i in range(new)]
    return model, run.before, blocks


COURSES = {
    "plain": ({"input_ids": prompt(2, 10)}, {}),
    "shifted": ({"input_ids": prompt(2, 10)}, {"shifted": True}),
    "mha": ({"input_ids": prompt(2, 10)}, {"num_key_value_heads": 4}),
    "padded": (models.padded([prompt(1, 10)[0], prompt(1, 6, seed=1)[0]]), {}),
}


@pytest.mark.parametrize("course", COURSES)
@pytest.mark.parametrize(
    "knobs",
    [
        "cache=dual, prefix_look=0, after_look=0, warmup_steps=0, cache_update_freq=1",
        "cache=prefix, prefix_look=0, warmup_steps=0, cache_update_freq=1",
        "cache=dual, prefix_look=999, after_look=999, warmup_steps=0",
        "cache=prefix, prefix_look=999, warmup_steps=2",
        "cache=dual, prefix_look=0, after_look=0, warmup_steps=999",
    ],
)
def test_a_cache_that_is_never_stale_changes_nothing(course: str, knobs: str) -> None:
    batch, form = COURSES[course]
    model, texts, blocks = static_course(12, 6, batch, **form)
    inputs = {"ids": batch["input_ids"], "mask": batch.get("attention_mask"), "block": 6, "new": 12}
    with hasten.apply(model) as fast:
        expected = logits_along(fast, texts, blocks, **inputs)
    with hasten.apply(model, f"dinfer(decoder=none, smoothing=false, {knobs})") as fast:
        found = logits_along(fast, texts, blocks, **inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_refreshed_vicinity_is_nearer_the_truth_than_the_block_alone(shifted: bool) -> None:
    batch = {"input_ids": prompt(4, 24)}
    model, texts, blocks = static_course(32, 8, batch, shifted=shifted)
    inputs = {"ids": batch["input_ids"], "block": 8, "new": 32}
    with hasten.apply(model) as fast:
        expected = logits_along(fast, texts, blocks, **inputs)
    errors = {}
    for look in (0, 8, 16, 99):
        knobs = f"cache=dual, prefix_look={look}, after_look={look}, warmup_steps=0"
        with hasten.apply(model, f"dinfer(decoder=none, smoothing=false, {knobs})") as fast:
            found = logits_along(fast, texts, blocks, **inputs)
        finite = expected[0].isfinite()
        errors[look] = [
            float((a - b)[finite].abs().mean()) for a, b in zip(found, expected, strict=True)
        ]
    mean = {look: sum(error) / len(error) for look, error in errors.items()}
    assert mean[0] > 1.05 * mean[8] > 1.05**2 * mean[16] and mean[99] < 1e-5
    for look in (0, 8):  # at a new block everything is computed, so there is no error
        assert max(errors[look][::8]) < 1e-5 < min(e for i, e in enumerate(errors[look]) if i % 8)


def test_the_cache_counts_what_it_spares() -> None:
    knobs = "decoder=none, smoothing=false, prefix_look=2, after_look=3, warmup_steps=4"
    text, run = steps(f"dinfer({knobs})", new=24, block=8)
    # 36 positions, blocks at 12, 20 and 28; the first passes of a block and the warm-up see all.
    rows = [36] * 4 + [13] * 4 + [36] + [13] * 7 + [36] + [10] * 7
    assert run.activity["positions"] == 3 * sum(rows)
    assert run.activity["dinfer.reused"] == 3 * sum(36 - r for r in rows)
    assert run.peak_cache_bytes > 0 and not bool((text == MASK).any())
    _, prefix = steps(f"dinfer(cache=prefix, {knobs})", new=24, block=8)
    rows = [36] * 4 + [26] * 4 + [36] + [18] * 7 + [36] + [10] * 7
    assert prefix.activity["positions"] == 3 * sum(rows)


# -------------------------------------------------------------------------------------- smoothing
NO_WEIGHT = "smoothing_start=0, smoothing_growth=0, smoothing_limit=0, threshold_decay=0"


@pytest.mark.parametrize("decoder", ["threshold", "hierarchical", "credit", "none"])
@pytest.mark.parametrize("cache", ["none", "dual"])
def test_smoothing_without_weight_is_no_smoothing(decoder: str, cache: str) -> None:
    knobs = f"decoder={decoder}, threshold=0.8, cache={cache}, prefix_look=2, after_look=2"
    logits = {}
    for smoothing in ("smoothing=false", NO_WEIGHT):
        with hasten.apply(filler(sharp=8.0), f"dinfer({knobs}, {smoothing})") as fast:
            noted = record(fast, prompt(2), block=12)
        logits[smoothing] = [noted.run.sequences(), *(g.logits for g in noted.guesses)]
    assert noted.run.activity["dinfer.softened"] > 0  # it was on
    for one, other in zip(*logits.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("cache", ["none", "dual"])
@pytest.mark.parametrize("form", ["plain", "shifted", "scaled"])
def test_open_places_are_read_with_the_beliefs_of_the_pass_before(
    form: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled = {"family": "gemma3_text", "layer_types": ["full_attention"] * 2, "sharp": 1.0}
    model = filler(**{"plain": {}, "shifted": {"shifted": True}, "scaled": scaled}[form])
    layer = model.get_input_embeddings()
    table = layer(torch.arange(len(layer.weight))).detach()  # scaled where the model scales them
    assert torch.equal(table, layer.weight) == (form != "scaled")
    seen: list[Tensor | None] = []
    with hasten.apply(model, f"dinfer(decoder=none, cache={cache}, warmup_steps=0)") as fast:
        technique = next(iter(fast.plan))
        embed = type(technique).embed

        def noted_embed(self: Any, *args: Any) -> Tensor | None:
            seen.append(embed(self, *args))
            return seen[-1]

        monkeypatch.setattr(type(technique), "embed", noted_embed)
        noted = record(fast, prompt(2), new=24, block=24)
    assert seen[0] is None  # nothing is believed yet
    for step in range(1, 24):
        weight = min(0.15 + 0.02 * (step - 1), 0.3)
        text = noted.before[step]
        expected = table[text].clone()
        beliefs = noted.guesses[step - 1].logits.softmax(-1) @ table
        soft = (text == MASK)[:, 12:]
        expected[:, 12:][soft] += weight * beliefs[soft]
        got = seen[step]
        assert got is not None
        first = 0 if got.shape[1] == 36 else 36 - got.shape[1]  # the vicinity reaches the start
        torch.testing.assert_close(got, expected[:, first:])


def test_with_smoothing_the_threshold_falls_to_its_value() -> None:
    knobs = "decoder=threshold, threshold=0.9, cache=none, threshold_decay=0.04"
    with hasten.apply(filler(sharp=12.0), f"dinfer({knobs})") as fast:
        noted = record(fast, prompt(3), block=24)
    for step, guess in enumerate(noted.guesses):
        threshold = max(1 - 0.04 * step, 0.9)
        places = (noted.before[step] == MASK) & (guess.confidence >= threshold)
        fixed = (noted.before[step] == MASK) & (noted.after[step] != MASK)
        assert not bool((places & ~fixed).any())
        assert int((fixed & ~places).sum(dim=1).max()) <= 1


# ---------------------------------------------------------------------------------------- plans
def test_parts_that_are_off_free_their_slots() -> None:
    parts = {
        "dinfer": {Slot.COMMITTER, Slot.WINDOW, Slot.EMBEDDING},
        "dinfer(decoder=none)": {Slot.WINDOW, Slot.EMBEDDING},
        "dinfer(cache=none)": {Slot.COMMITTER, Slot.EMBEDDING},
        "dinfer(smoothing=false)": {Slot.COMMITTER, Slot.WINDOW},
    }
    for text, slots in parts.items():
        assert set(next(iter(Plan.parse(text))).terms().slots) == slots
    Plan.parse("dinfer(decoder=none), confidence_threshold")
    Plan.parse("dinfer(decoder=none, smoothing=false), saber")
    Plan.parse("dinfer(decoder=none, smoothing=false), freedave")
    for text, why in {
        "dinfer, saber": "committer",
        "dinfer(decoder=credit, cache=none, smoothing=false), freedave": "committer",
        "dinfer(decoder=none, cache=none), freedave": "nothing but tokens",
        "dinfer(cache=none), freecache": "committer",
        "dinfer(decoder=none), freecache(guided=False)": "window",
        "dinfer(decoder=none), saber": "nothing but tokens",
        "dinfer(decoder=none, smoothing=false, cache=prefix), saber": "stay fixed",
    }.items():
        with pytest.raises(PlanError, match=why):
            Plan.parse(text)


def test_a_word_without_quotes_is_a_text_and_survives_writing() -> None:
    plan = Plan.parse("dinfer(decoder=none, cache=none, smoothing=false)")
    assert next(iter(plan)).knobs["cache"] == "none"
    assert Plan.parse(str(plan)) == plan == Plan.from_toml(plan.to_toml())


@pytest.mark.parametrize("knobs", ["", "decoder=credit", "cache=prefix, cache_update_freq=3"])
@pytest.mark.parametrize("form", [{}, {"shifted": True}, {"dtype": torch.bfloat16}])
def test_all_parts_together_on_padded_batches(knobs: str, form: dict[str, Any]) -> None:
    batch = models.padded([prompt(1, n, seed=n)[0] for n in (12, 7, 3)])
    plan = f"dinfer(threshold=0.6, warmup_steps=1, prefix_look=2, after_look=2, {knobs})"
    with hasten.apply(filler(sharp=8.0, **form), plan.replace(", )", ")")) as fast:
        out = fast.generate(**batch, max_new_tokens=32, block_length=16, **NEVER)
        assert out.shape == (3, 44) and not bool((out == MASK).any())
        assert torch.equal(out[:, :12], batch["input_ids"])
        for counter in ("parallel", "reused", "softened"):
            assert fast.activity[f"dinfer.{counter}"] > 0
        assert fast.activity["passes"] < 32
        again = fast.generate(**batch, max_new_tokens=32, block_length=16, **NEVER)
        assert torch.equal(out, again)  # no state is left over
        sampled = fast.generate(**batch, max_new_tokens=16, do_sample=True, seed=1)
        assert not bool((sampled == MASK).any())


def test_a_row_that_ended_stays_as_it_is() -> None:
    with hasten.apply(filler(sharp=8.0), "dinfer(threshold=0.5, warmup_steps=0)") as fast:
        free = fast.generate(prompt(3), max_new_tokens=32, block_length=8, **NEVER)
        eos = int(free[0, 14])
        out = fast.generate(
            prompt(3), max_new_tokens=32, block_length=8, eos_token_id=eos, pad_token_id=0
        )
    for row in out:
        ends = (row[12:] == eos).nonzero()[:, 0]
        if ends.numel():
            assert bool((row[12 + int(ends[0]) + 1 :] == 0).all())
    assert bool((out[0] == eos).any())
