"""Prompt lookup: what it finds, and that looking up changes nothing but the number of passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.causal.drafter.prompt_lookup import lookup
from hasten.causal.runners import EagerRunner
from tests import models

GREEDY = {"max_new_tokens": 40, "eos_token_id": -1}


def look(
    *rows: list[int], pads: list[int] | None = None, lengths: list[int] | None = None, **knobs: int
) -> Any:
    """`lookup` on rows of equal length, as lists."""
    tokens = torch.tensor(rows)
    settings = {"num_draft": 3, "max_ngram": 3, "min_ngram": 1} | knobs
    found = lookup(
        tokens,
        torch.tensor(pads or [0] * len(rows)),
        torch.tensor(lengths or [tokens.shape[1]] * len(rows)),
        **settings,
    )
    return None if found is None else found.tolist()


def test_what_followed_the_end_before_is_drafted() -> None:
    assert look([5, 6, 7, 8, 9, 1, 5, 6]) == [[7, 8, 9]]
    assert look([1, 2, 3, 4]) is None
    assert look([3]) is None


def test_a_longer_match_wins_and_of_equal_ones_the_latest() -> None:
    assert look([1, 2, 3, 9, 9, 8, 3, 4, 4, 4, 1, 2, 3]) == [[9, 9, 8]]
    assert look([1, 2, 7, 7, 1, 2, 8, 8, 1, 2], max_ngram=2) == [[8, 8, 1]]
    assert look([2, 7, 7, 1, 2, 8, 8, 3, 2], min_ngram=2) is None


def test_a_continuation_that_runs_out_goes_round() -> None:
    assert look([4, 5, 4, 5], num_draft=5) == [[4, 5, 4, 5, 4]]
    assert look([9, 7, 7], num_draft=4) == [[7, 7, 7, 7]]


def test_padding_and_what_lies_behind_a_row_are_not_searched() -> None:
    assert look([0, 0, 0, 1, 2, 0], pads=[3]) is None
    assert look([0, 0, 0, 1, 2, 0], pads=[2]) == [[1, 2, 0]]
    rows = [[1, 2, 3, 1, 9, 9], [1, 2, 3, 4, 1, 2], [5, 6, 7, 8, 9, 4]]
    assert look(*rows, lengths=[4, 6, 6]) == [[2, 3, 1], [3, 4, 1], [-1, -1, -1]]


def repeating(rows: int = 3) -> dict[str, Tensor]:
    """Prompts of different lengths, each a stretch that repeats."""
    stretches = [
        models.prompt(1, 9, seed=seed)[0].repeat(3)[: 20 + 3 * seed] for seed in range(rows)
    ]
    return models.padded(stretches)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "knobs", ["min_ngram=1", "min_ngram=1, num_draft=9, max_ngram=1", "min_ngram=2"]
)
def test_greedy_ids_stay_the_same(family: str, knobs: str) -> None:
    model, inputs = models.tiny_model(family), repeating()
    expected = model.generate(**inputs, **GREEDY)
    with hasten.apply(model, f"prompt_lookup({knobs})") as fast:
        assert torch.equal(fast.generate(**inputs, **GREEDY), expected)
        accepted, drafted = (
            fast.activity.get(f"prompt_lookup.{what}", 0) for what in ("accepted", "drafted")
        )
        assert accepted <= drafted
        assert 3 * 40 - accepted <= 3 * fast.activity["passes"]


def test_a_model_that_repeats_itself_needs_few_passes() -> None:
    model = models.tiny_model()
    with torch.no_grad():  # every layer adds nothing, so the next token depends on this one only
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
    inputs = {"input_ids": models.prompt(1, 12)}
    expected = model.generate(**inputs, max_new_tokens=160, eos_token_id=-1)
    with hasten.apply(model, "prompt_lookup(num_draft=4)") as fast:
        assert torch.equal(fast.generate(**inputs, max_new_tokens=160, eos_token_id=-1), expected)
        assert fast.activity["prompt_lookup.accepted"] == 160 - fast.activity["passes"]
        assert fast.activity["passes"] < 80


def test_a_draft_has_the_same_number_of_nodes_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = set()
    forward = EagerRunner.forward

    def noted(self: Any, block: Any, *args: Any, **kwargs: Any) -> Any:
        widths.add(0 if block.is_prompt else block.num_logits - 1)
        return forward(self, block, *args, **kwargs)

    monkeypatch.setattr(EagerRunner, "forward", noted)
    with hasten.apply(models.tiny_model(), "prompt_lookup(min_ngram=1, num_draft=5)") as fast:
        fast.generate(**repeating(), **GREEDY)
    assert widths == {0, 5}


def test_nothing_found_is_nothing_done() -> None:
    prompt = torch.arange(1, 30)[None]
    with hasten.apply(models.tiny_model(), "prompt_lookup") as fast:
        fast.generate(prompt, max_new_tokens=1, eos_token_id=-1)
        assert not [key for key in fast.activity if key.startswith("prompt_lookup")]
