"""The plain committers: a fixed number of tokens a pass, and a fixed confidence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hasten
from hasten.errors import PlanError
from tests import models
from tests.techniques.fillers import MASK, NEVER, Record, filler, prompt, record


def static(ids: Tensor, new: int = 24, *, shifted: bool = False, **arguments: object) -> Tensor:
    with hasten.apply(filler(shifted=shifted)) as fast:
        out = fast.generate(ids, max_new_tokens=new, **NEVER, **arguments)
    assert isinstance(out, Tensor)
    return out


def fixed_in(noted: Record, step: int) -> Tensor:
    """(batch, length) bool, what a pass fixed."""
    return (noted.before[step] == MASK) & (noted.after[step] != MASK)


@pytest.mark.parametrize(
    "plan", ["fixed_steps(tokens_per_pass=1)", "confidence_threshold(threshold=2)"]
)
@pytest.mark.parametrize("shifted", [False, True])
def test_one_place_a_pass_is_static_decoding(plan: str, shifted: bool) -> None:
    ids = prompt(3)
    with hasten.apply(filler(shifted=shifted), plan) as fast:
        out = fast.generate(ids, max_new_tokens=24, **NEVER)
        assert torch.equal(out, static(ids, shifted=shifted))
        assert fast.activity["passes"] == 24
        assert set(fast.activity) == {"passes", "positions", "emitted"}  # it did nothing


@pytest.mark.parametrize(("number", "block", "passes"), [(2, 24, 12), (5, 12, 6), (100, 8, 3)])
def test_fixed_steps_takes_the_best_and_no_more(number: int, block: int, passes: int) -> None:
    with hasten.apply(filler(), f"fixed_steps(tokens_per_pass={number})") as fast:
        noted = record(fast, prompt(2), block=block)
    assert len(noted.guesses) == noted.run.activity["passes"] == passes
    assert noted.run.activity["fixed_steps.parallel"] == 2 * (24 - passes)
    for step, guess in enumerate(noted.guesses):
        first = 12 + step // -(-block // number) * block
        places = noted.before[step] == MASK
        places[:, first + block :] = False
        for row, fixed in enumerate(fixed_in(noted, step)):
            most = guess.confidence[row][places[row]].topk(min(number, int(places[row].sum())))
            assert (
                sorted(guess.confidence[row][fixed].tolist(), reverse=True) == most.values.tolist()
            )


def test_a_threshold_fixes_all_sure_places_and_always_one() -> None:
    with hasten.apply(filler(sharp=8.0), "confidence_threshold(threshold=0.8)") as fast:
        noted = record(fast, prompt(3), block=24)
    extra = 0
    for step, guess in enumerate(noted.guesses):
        for row, fixed in enumerate(fixed_in(noted, step)):
            places = noted.before[step][row] == MASK
            if not bool(places.any()):
                assert not bool(fixed.any())
                continue
            confidence = guess.confidence[row].masked_fill(~places, -1.0)
            expected = places & (confidence >= 0.8)
            expected[confidence.argmax()] = True
            assert torch.equal(fixed, expected)
            extra += int(fixed.sum()) - 1
            assert torch.equal(noted.after[step][row][fixed], guess.tokens[row][fixed])
    assert 0 < extra == noted.run.activity["confidence_threshold.parallel"]


@pytest.mark.parametrize("plan", ["fixed_steps", "confidence_threshold(threshold=0.5)"])
def test_rows_of_a_padded_batch_are_what_they_are_alone(plan: str) -> None:
    rows = [prompt(1, 12)[0], prompt(1, 7, seed=1)[0], prompt(1, 9, seed=2)[0]]
    with hasten.apply(filler(), plan) as fast:
        together = fast.generate(**models.padded(rows), max_new_tokens=16, **NEVER)
        for row, ids in zip(together, rows, strict=True):
            alone = fast.generate(ids[None], max_new_tokens=16, **NEVER)
            assert torch.equal(row[12:], alone[0, ids.numel() :])


@pytest.mark.parametrize("plan", ["fixed_steps", "confidence_threshold(threshold=0.3)"])
def test_half_precision_sampling_and_infilling_work(plan: str) -> None:
    with hasten.apply(filler(dtype=torch.bfloat16), plan) as fast:
        first = fast.generate(prompt(2), max_new_tokens=16, do_sample=True, seed=3)
        again = fast.generate(prompt(2), max_new_tokens=16, do_sample=True, seed=3)
        assert torch.equal(first, again)
        text = prompt(2, 24)
        holes = text.clone()
        holes[0, 3:9], holes[1, 15:22] = MASK, MASK
        filled = fast.infill(holes)
        assert torch.equal(filled[holes != MASK], text[holes != MASK])
        assert not bool((filled == MASK).any())
        assert fast.activity["passes"] < 7


def test_knobs_out_of_range_are_refused() -> None:
    for plan in ("fixed_steps(tokens_per_pass=0)", "confidence_threshold(threshold=-0.1)"):
        with pytest.raises(PlanError, match="out of range"):
            hasten.apply(filler(), plan)
