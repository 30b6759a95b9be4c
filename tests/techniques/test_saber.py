"""Saber: its rule beside a plain one-row version of the sheet, and what backtracking finds."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.causal.generation import Settings
from hasten.errors import PlanError
from hasten.masked.denoiser import Denoiser
from hasten.masked.remasker.saber import Saber
from hasten.masked.runners import Said
from hasten.masked.sampling import Sampler
from hasten.plan import Plan
from hasten.subject import MaskedForm
from hasten.technique import Slot
from tests import models
from tests.techniques.fillers import (
    LETTERS,
    MASK,
    NEVER,
    Record,
    consistency,
    filler,
    prompt,
    record,
    sentences,
    speaker,
)


def reference(
    model: Any,
    text: list[int],
    block: int,
    *,
    n: int = 2,
    adaptive: bool = True,
    sampler: Sampler | None = None,
) -> tuple[list[list[int]], Counter[str]]:
    """The text after each pass, by the sheet's steps, place by place, for one row; and counters.

    Args:
        text: ids with masks; those that are none never change.
        sampler: draws the tokens; the likeliest ones without.
    """
    sees = getattr(model.config, "block_length", None)
    denoiser = Denoiser(model, MaskedForm(MASK, model.config.shifted_logits, sees))
    text, wanted_places = list(text), [p for p, token in enumerate(text) if token == MASK]
    start = wanted_places[0]
    last = [0.0] * len(text)
    at_commit: dict[int, float] = {}
    lost: dict[int, int] = {}
    done: set[int] = set()
    texts, counted = [], Counter[str]()
    for first in range(start, len(text), block):
        end = min(first + block, len(text))
        places = [p for p in wanted_places if p < end]
        while any(text[p] == MASK for p in places):
            wanted, ids = torch.arange(start, end), torch.tensor([text])
            logits = denoiser.read(ids, wanted).logits
            chances = logits[0].softmax(-1)
            drawn = (
                logits.argmax(-1) if sampler is None else sampler.best(logits, ids, wanted, MASK)
            )
            best = {p: int(drawn[0, p - start]) for p in places}
            confidence = {p: float(chances[p - start, best[p]]) for p in places}
            delta = {p: c - last[p] for p, c in confidence.items()}
            last = [confidence.get(p, -math.inf) for p in range(len(text))]
            tau = sum(at_commit.values()) / len(at_commit) if at_commit else 1.0
            if not adaptive:
                tau = math.inf
            still = [p for p in places if p not in done]
            commit = [p for p in still if confidence[p] > tau]
            if len(commit) < n:
                commit = sorted(still, key=lambda p: -confidence[p])[:n]
            for p in commit:
                text[p], at_commit[p] = best[p], confidence[p]
                done.add(p)
                counted["returned"] += lost.get(p) == text[p]
            counted["parallel"] += len(commit) - 1
            if any(text[p] == MASK for p in places):
                fixed = max(n, len(commit))
                number = min(max(n // 2, math.ceil(fixed / 8)), fixed - 1)
                for p in sorted(done, key=lambda p: (delta[p], p))[:number]:
                    text[p], lost[p] = MASK, text[p]
                    done.discard(p)
                    counted["reopened"] += 1
            texts.append(list(text))
    return texts, +counted


def counters(noted: Record) -> dict[str, int]:
    """What Saber counted."""
    own = "saber."
    found = noted.run.activity.items()
    return {name.removeprefix(own): n for name, n in found if name.startswith(own)}


@pytest.mark.parametrize("block", [24, 8])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"shifted": True},
        {"num_key_value_heads": 4},
        {"block_length": 8},
        {"shifted": True, "block_length": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_every_pass_is_the_sheets(n: int, form: dict[str, Any], block: int) -> None:
    for sharp in (2.0, 8.0):
        model = filler(sharp=sharp, **form)
        with hasten.apply(model, f"saber(min_tokens={n})") as fast:
            noted = record(fast, prompt(1), block=block)
        text = [*prompt(1)[0].tolist(), *[MASK] * 24]
        expected, counted = reference(model, text, block, n=n)
        assert [text[0].tolist() for text in noted.after] == expected
        assert counters(noted) == counted


@pytest.mark.parametrize("shifted", [False, True])
def test_holes_and_drawn_tokens_follow_the_sheet_too(shifted: bool) -> None:
    """A drawn token is as sure as the model finds it, whatever the temperature."""
    model = filler(sharp=8.0, shifted=shifted)
    text = prompt(1, 40, seed=3)
    text[0, 4:9], text[0, 12:32], text[0, [35, 38, 39]] = MASK, MASK, MASK
    drawn: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 4}
    for block in (None, 12):
        for n, arguments in ((1, {}), (2, {}), (3, drawn)):
            sampler = Sampler(
                Settings.resolve(model, 40, {"max_new_tokens": 1, **arguments}), batch=1
            )
            with hasten.apply(model, f"saber(min_tokens={n})") as fast:
                filled = fast.infill(text, block_length=block, **arguments)
                expected, counted = reference(
                    model, text[0].tolist(), block or 40, n=n, sampler=sampler
                )
                assert filled[0].tolist() == expected[-1]
                assert fast.activity["passes"] == len(expected)
                assert fast.activity["saber.reopened"] == counted["reopened"] > 0


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_the_quota_is_the_sheets(n: int) -> None:
    fixed = list(range(1, 70))
    expected = [min(max(n // 2, math.ceil(k / 8)), k - 1) for k in fixed]
    assert Saber(min_tokens=n).quota(torch.tensor(fixed)).tolist() == expected
    assert all(back < k for back, k in zip(expected, fixed, strict=True))
    assert Saber(min_tokens=n, backtrack="none").quota(torch.tensor(fixed)).tolist() == [0] * 69
    # A row that waits fixes nothing, and nothing of it is opened.
    assert Saber(min_tokens=n).quota(torch.tensor([0])).tolist() == [0]


def test_one_place_a_pass_without_a_threshold_is_static_decoding() -> None:
    model = filler(sharp=8.0)
    with hasten.apply(model) as fast:
        expected = fast.generate(prompt(3), max_new_tokens=24, block_length=12, **NEVER)
    with hasten.apply(model, "saber(min_tokens=1, accelerate=false)") as fast:
        out = fast.generate(prompt(3), max_new_tokens=24, block_length=12, **NEVER)
        assert torch.equal(out, expected)
        assert set(fast.activity) == {"passes", "positions", "emitted"}
        assert fast.activity["passes"] == 24


def moves(
    monkeypatch: pytest.MonkeyPatch, model: Any, plan: str, ids: Tensor, **how: Any
) -> tuple[Record, list[Tensor], list[Tensor]]:
    """A record, and (batch,) how many places each pass fixed, and how many it opened again."""
    with monkeypatch.context() as patch, hasten.apply(model, plan) as fast:
        kind = type(next(iter(fast.plan)))
        choose, chosen = kind.choose, []

        def noted_choose(self: Any, *args: Any) -> Tensor:
            chosen.append(choose(self, *args))
            return chosen[-1]

        patch.setattr(kind, "choose", noted_choose)
        noted = record(fast, ids, **how)
    opened = [
        (after == MASK) & ((before != MASK) | fixed)
        for before, after, fixed in zip(noted.before, noted.after, chosen, strict=True)
    ]
    return noted, [fixed.sum(dim=1) for fixed in chosen], [back.sum(dim=1) for back in opened]


@pytest.mark.parametrize("plan", ["saber", "saber(min_tokens=6)", "saber(backtrack=random)"])
def test_progress_is_net_positive_and_adds_up(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noted, committed, opened = moves(
        monkeypatch, filler(sharp=8.0), plan, prompt(4), new=32, block=16
    )
    assert (
        torch.stack(committed).sum(dim=0).sub(torch.stack(opened).sum(dim=0)).tolist() == [32] * 4
    )
    for fixed, back in zip(committed, opened, strict=True):
        waiting = fixed == 0  # the block of this row is full, that of another is not
        assert bool((fixed - back >= 1)[~waiting].all()) and bool((back[waiting] == 0).all())
    assert noted.run.activity["passes"] <= 32
    assert noted.run.activity["saber.reopened"] == int(torch.stack(opened).sum()) > 0
    assert noted.run.activity["emitted"] == 4 * 32


def test_the_later_the_more_is_fixed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = sentences(48, 1, torch.Generator().manual_seed(0))

    def correlation(plan: str) -> float:
        """Of how much stands with how much is fixed, where more than ten places are left."""
        noted, committed, _ = moves(monkeypatch, speaker(), plan, ids, new=31, block=31)
        left = torch.stack([(before == MASK).sum(dim=1) for before in noted.before])
        points = torch.stack((31 - left, torch.stack(committed)))[:, left > 10]
        return float(points.double().corrcoef()[0, 1])

    assert correlation("saber") > 0.1
    assert correlation("saber(backtrack=none)") > 0.3
    _, flat, _ = moves(monkeypatch, speaker(), "saber(accelerate=false)", ids, new=31, block=31)
    assert {int(n) for fixed in flat[:-1] for n in fixed} == {2}


def caught(
    plan: str, when: int, rows: int = 64, new: int = 28, within: int = 3
) -> tuple[float, float]:
    """Shares of rows in which a letter that was changed is opened, and another would have been.

    Before pass `when` one fixed letter of each row becomes a wrong one.
    """
    generator = torch.Generator().manual_seed(5)
    ids = sentences(rows, 4, generator)
    with hasten.apply(speaker(), plan) as fast:
        run, _ = fast._generation(ids, None, new, {"max_new_tokens": new, **NEVER})
        step, number = run.step, 0
        victim = torch.zeros(rows, 1, dtype=torch.long)
        found, spared = torch.zeros(rows).bool(), torch.ones(rows)

        def watch() -> None:
            nonlocal number, victim, found, spared
            if number == when:
                fixed = ~run.masked & ~run.given
                luck = torch.rand(fixed.shape, generator=generator).masked_fill(~fixed, -1.0)
                victim = luck.argmax(dim=1, keepdim=True)
                shift = torch.randint(1, LETTERS, (rows, 1), generator=generator)
                wrong = (run.tokens.gather(1, victim) - 1 + shift) % LETTERS + 1
                run.tokens = run.tokens.scatter(1, victim, wrong)
            held = ~run.masked & ~run.given
            step()
            if when <= number < when + within:
                found |= run.masked.gather(1, victim)[:, 0]
                spared *= 1 - (held & run.masked).sum(dim=1) / held.sum(dim=1).clamp(min=1)
            number += 1

        run.step = watch  # type: ignore[method-assign]
        fast._execute(run)
    return float(found.float().mean()), float((1 - spared).mean())


def test_a_token_that_was_changed_is_taken_back() -> None:
    for when in (5, 8, 11):
        found, chance = caught("saber", when)
        assert found > 0.3 and found > 3 * chance, (when, found, chance)
        for fake in ("random", "confidence"):
            assert caught(f"saber(backtrack={fake})", when)[0] < 0.5 * found


def test_opening_at_random_is_worse_and_not_opening_worse_still() -> None:
    quality, passes = {}, {}
    for plan in ("drop", "random", "none"):
        with hasten.apply(speaker(), f"saber(min_tokens=4, backtrack={plan})") as fast:
            made, count = [], 0
            for given in (2, 3):
                ids = sentences(128, given, torch.Generator().manual_seed(given))
                out = fast.generate(
                    ids, max_new_tokens=32 - given, block_length=32 - given, **NEVER
                )
                made.append(consistency(out))
                count += fast.activity["passes"]
        quality[plan], passes[plan] = sum(made) / 2, count
    assert quality["drop"] > quality["random"] + 0.004 > quality["none"] + 0.02
    assert passes["drop"] <= passes["random"] + 1


def test_a_pass_that_fills_the_block_opens_nothing() -> None:
    with hasten.apply(filler(), "saber(min_tokens=64)") as fast:
        out = fast.generate(prompt(2), max_new_tokens=32, block_length=16, **NEVER)
        assert fast.activity["passes"] == 2 and "saber.reopened" not in fast.activity
    assert not bool((out == MASK).any())


def test_places_of_an_earlier_block_may_be_opened_and_are_filled_again() -> None:
    with hasten.apply(filler(sharp=8.0), "saber") as fast:
        noted = record(fast, prompt(4), new=32, block=8)
    last = [after for after in noted.after if bool((after[:, 36:] != MASK).any())]
    assert any(bool((after[:, 12:36] == MASK).any()) for after in last)
    assert not bool((noted.run.sequences() == MASK).any())


def test_given_places_are_never_opened() -> None:
    text = prompt(3, 30)
    holes = text.clone()
    holes[0, 2:12], holes[1, 8:22], holes[2, [1, 5, 9, 25, 26, 27, 28]] = MASK, MASK, MASK
    with hasten.apply(filler(sharp=8.0), "saber") as fast:
        for block in (None, 5):
            filled = fast.infill(holes, block_length=block)
            assert torch.equal(filled[holes != MASK], text[holes != MASK])
            assert not bool((filled == MASK).any())
            assert fast.activity["saber.reopened"] > 0


@pytest.mark.parametrize("form", [{}, {"shifted": True}, {"dtype": torch.bfloat16}])
def test_padded_batches_sampling_and_an_early_end(form: dict[str, Any]) -> None:
    rows = [prompt(1, 12)[0], prompt(1, 7, seed=1)[0], prompt(1, 3, seed=2)[0]]
    batch = models.padded(rows)
    with hasten.apply(filler(sharp=8.0, **form), "saber") as fast:
        out = fast.generate(**batch, max_new_tokens=32, block_length=16, **NEVER)
        assert out.shape == (3, 44) and not bool((out == MASK).any())
        if not form.get("dtype"):
            for row, ids in zip(out, rows, strict=True):
                alone = fast.generate(ids[None], max_new_tokens=32, block_length=16, **NEVER)
                assert torch.equal(row[12:], alone[0, ids.numel() :])
        again = fast.generate(**batch, max_new_tokens=32, block_length=16, **NEVER)
        assert torch.equal(out, again)
        sampled = fast.generate(**batch, max_new_tokens=16, do_sample=True, seed=1, **NEVER)
        assert not bool((sampled == MASK).any())
        eos = int(out[0, 15])
        ended = fast.generate(
            **batch, max_new_tokens=32, block_length=16, eos_token_id=eos, pad_token_id=0
        )
        assert not bool((ended == MASK).any())
        for row in ended:
            ends = (row[12:] == eos).nonzero()[:, 0]
            if ends.numel():
                assert bool((row[12 + int(ends[0]) + 1 :] == 0).all())


def test_it_runs_over_a_cache_that_recomputes_what_it_looks_at() -> None:
    knobs = "decoder=none, smoothing=false, cache=dual, prefix_look=0, after_look=0, warmup_steps=0"
    with hasten.apply(filler(sharp=8.0), f"saber, dinfer({knobs})") as fast:
        out = fast.generate(prompt(2), max_new_tokens=32, block_length=16, **NEVER)
        assert not bool((out == MASK).any())
        assert fast.activity["dinfer.reused"] > 0 and fast.activity["saber.reopened"] > 0
    for other, why in {
        "fixed_steps": "committer",
        "freedave": "committer",
        "freecache": "committer",
        "freecache(guided=False)": "places that stay fixed",
        "dinfer": "committer",
        "dinfer(decoder=none, cache=none)": "inputs that are nothing but tokens",
        "dinfer(decoder=none, smoothing=false, cache=prefix)": "places that stay fixed",
    }.items():
        with pytest.raises(PlanError, match=why):
            Plan.parse(f"saber, {other}")


def test_without_backtracking_it_only_fixes() -> None:
    """Then what is fixed stays, the other slot is free, and a text can be streamed."""
    (both,) = Plan.parse("saber(min_tokens=1)")  # a pass may fix several, and then open some
    assert both.terms().slots == (Slot.COMMITTER, Slot.REMASKER)
    for knobs in ("backtrack=none", "min_tokens=1, accelerate=false"):
        (alone,) = Plan.parse(f"saber({knobs})")
        assert alone.terms().slots == (Slot.COMMITTER,) and not alone.terms().changes
    plan = "saber(backtrack=none)"
    for cache in ("freecache(guided=False)", "dinfer(decoder=none, smoothing=false, cache=prefix)"):
        Plan.parse(plan, cache)
    with hasten.apply(filler(sharp=8.0), plan) as fast:
        pieces = list(fast.stream(prompt(1), max_new_tokens=24, block_length=8, **NEVER))
        assert len(pieces) > 2 and sum(map(len, pieces)) == 24
        assert "saber.reopened" not in fast.activity and fast.activity["saber.parallel"] > 0


@pytest.mark.parametrize("shifted", [False, True])
def test_every_place_that_may_be_opened_is_computed_in_every_pass(
    shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And over a cache that is never stale it does what it does without one."""
    passes: list[tuple[Tensor | None, Tensor, Tensor]] = []
    read = Denoiser.read

    def noted_read(self: Any, tokens: Tensor, wanted: Tensor, **more: Any) -> Said:
        passes.append((more.get("rows"), wanted, tokens))
        return read(self, tokens, wanted, **more)

    monkeypatch.setattr(Denoiser, "read", noted_read)
    cache = "decoder=none, smoothing=false, cache=dual, prefix_look=0, after_look=0, warmup_steps=0"
    texts = {}
    for plan in (
        "saber",
        f"saber, dinfer({cache}, cache_update_freq=1)",
        f"saber, dinfer({cache})",
    ):
        passes.clear()
        with hasten.apply(filler(sharp=8.0, shifted=shifted), plan) as fast:
            noted = record(fast, prompt(2), new=32, block=8)
        texts[plan] = [text.tolist() for text in noted.after]
    alone, fresh, _ = texts.values()
    assert fresh == alone
    earlier = 0
    for rows, wanted, text in passes:
        assert int(wanted[0]) == 12  # all that was not given, up to the end of the block in hand
        if rows is not None:
            assert rows.tolist() == list(range(12 - shifted, int(wanted[-1]) + 1))
            earlier += bool((text[:, 12 : int(wanted[-1]) - 7] == MASK).any())
    assert earlier > 0  # places of blocks before were open, and computed
