"""The decode loop beside transformers' own `generate` and forward passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten.causal.attention import NAME
from hasten.causal.engine import CausalModel
from hasten.causal.run import Run
from hasten.causal.slots import Draft, Drafter
from hasten.errors import HastenError, PlanError
from hasten.technique import _REGISTERED, Card, Contract, Loss, Slot, technique
from tests import models

Tiny = Callable[..., PreTrainedModel]


@pytest.fixture
def tree_drafter() -> Any:
    """A drafter whose tree holds the right tokens on a path that is not the first, and wrong ones."""

    @technique("tree_of_the_answer")
    @dataclass(frozen=True, kw_only=True)
    class TreeOfTheAnswer(Drafter):
        card: ClassVar[Card] = Card(title="test", family="decoding", loss=Loss.EXACT)
        contract: ClassVar[Contract] = Contract(
            slots=(Slot.DRAFTER,), runners=frozenset({"eager", "compiled"})
        )

        def bind(self, model: Any, parts: Any) -> Any:
            return parts.get("answer")

        def begin(self, run: Run, bound: Any) -> Any:
            return bound

        def propose(self, state: Any, run: Run) -> Draft:
            right = []
            for row in range(run.batch):
                at = int(run.lengths[row])
                right.append(state[row, at : at + 3].tolist() + [1] * 3)
            nodes = [[r[0] + 1, r[0], r[1], r[1] + 1, r[2]] for r in right]
            tokens = torch.tensor(nodes).clamp(max=models.VOCABULARY - 1)
            run.activity["tree_of_the_answer.drafted"] += tokens.shape[1]
            return Draft(tokens, (-1, -1, 1, 1, 2))

    yield "tree_of_the_answer"
    _REGISTERED.pop("tree_of_the_answer")


def answer_of(
    model: PreTrainedModel, inputs: dict[str, Tensor], new: int, **arguments: Any
) -> Tensor:
    """transformers' own output."""
    return model.generate(**inputs, max_new_tokens=new, **arguments)


@pytest.mark.parametrize("runner", ["eager", "compiled"])
def test_a_tree_gives_the_same_ids_in_fewer_passes(
    tiny_llama: Tiny, tree_drafter: str, runner: str
) -> None:
    model = tiny_llama()
    inputs = models.padded([models.prompt(length=20)[0], models.prompt(length=13, seed=1)[0]])
    wanted = answer_of(model, inputs, 24)
    padded = torch.cat((wanted, wanted.new_ones((2, 8))), dim=1)
    with hasten.apply(
        model, tree_drafter, parts={tree_drafter: {"answer": padded}}, runner=runner
    ) as fast:
        got = fast.generate(**inputs, max_new_tokens=24)
        assert torch.equal(got, wanted)
        assert fast.activity["passes"] <= 1 + 24 // 4 + 1
        penalised = answer_of(model, inputs, 24, repetition_penalty=1.3)
        assert torch.equal(
            fast.generate(**inputs, max_new_tokens=24, repetition_penalty=1.3), penalised
        )


def test_the_cache_after_a_tree_is_that_of_a_fresh_prefill(
    tiny_llama: Tiny, tree_drafter: str
) -> None:
    model = tiny_llama()
    prompt = models.prompt(length=20)
    wanted = answer_of(model, {"input_ids": prompt}, 24)
    padded = torch.cat((wanted, wanted.new_ones((1, 8))), dim=1)
    with hasten.apply(model, tree_drafter, parts={tree_drafter: {"answer": padded}}) as fast:
        run = fast._run(prompt, None, {"max_new_tokens": 24})
        run.execute()
        filled = int(run.lane.filled[0])
        fresh = fast._run(run.tokens[:, :filled], None, {"max_new_tokens": 1})
        fresh.execute()
    for ours, theirs in zip(run.lane.cache.layers, fresh.lane.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys[:, :, :filled], theirs.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values[:, :, :filled], theirs.values, atol=1e-5, rtol=1e-5)
        assert ours.positions[0, 0, :filled].tolist() == list(range(filled))


def test_score_is_the_likelihood_of_one_forward_pass(tiny_llama: Tiny) -> None:
    model = tiny_llama()
    inputs = models.padded([models.prompt(length=20)[0], models.prompt(length=9, seed=1)[0]])
    continuation = models.prompt(2, 12, seed=3)
    with hasten.apply(model) as plain:
        score = plain.score(inputs["input_ids"], continuation, inputs["attention_mask"])
    for row, length in enumerate((20, 9)):
        ids = torch.cat((inputs["input_ids"][row, -length:], continuation[row]))[None]
        with torch.no_grad():
            logits = model(ids).logits[0, length - 1 : -1]
        wanted = -logits.log_softmax(-1).gather(1, continuation[row][:, None])[:, 0]
        torch.testing.assert_close(score.nll[row], wanted, atol=1e-4, rtol=1e-4)


def test_stream_yields_what_generate_returns(tiny_llama: Tiny) -> None:
    with hasten.apply(tiny_llama()) as plain:
        prompt = models.prompt()
        pieces = list(plain.stream(prompt, max_new_tokens=10))
        assert torch.equal(torch.cat(pieces), plain.generate(prompt, max_new_tokens=10)[0, 16:])


def test_a_reader_that_goes_away_stops_the_stream(tiny_llama: Tiny) -> None:
    with hasten.apply(tiny_llama()) as plain:
        stream = plain.stream(models.prompt(), max_new_tokens=400)
        next(stream)
        stream.close()
        assert plain.generate(models.prompt(), max_new_tokens=3).shape[1] == 19


def test_a_fork_gives_the_same_distribution_as_a_fresh_prefill(tiny_llama: Tiny) -> None:
    with hasten.apply(tiny_llama()) as plain:
        run = plain._run(models.prompt(), None, {"max_new_tokens": 20})
        run.prefill()
        for _ in range(4):
            run.step()
        twin = run.fork(torch.tensor([0, 0, 0]))
        run.step()
        twin.step()
        assert twin.last is not None and run.last is not None
        torch.testing.assert_close(twin.last.logits, run.last.logits.expand(3, -1, -1))
        fresh = plain._run(run.tokens[:, : int(run.lengths[0]) - 1], None, {"max_new_tokens": 1})
        fresh.prefill()
        assert fresh.last is not None
        torch.testing.assert_close(fresh.last.logits, run.last.logits, atol=1e-5, rtol=1e-5)


def test_the_model_keeps_its_own_attention(tiny_llama: Tiny) -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    with hasten.apply(model) as plain:
        plain.generate(models.prompt(), max_new_tokens=2)
        assert model.config._attn_implementation == before != NAME
    assert model.generate(models.prompt(), max_new_tokens=2).shape == (1, 18)


def test_apply_twice_and_use_after_undo_are_errors(tiny_llama: Tiny) -> None:
    model = tiny_llama()
    fast = hasten.apply(model)
    with pytest.raises(PlanError, match="call undo"):
        hasten.apply(model)
    fast.undo()
    fast.undo()
    with pytest.raises(PlanError, match="undone"):
        fast.generate(models.prompt())
    hasten.apply(model).undo()


BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range"),
    ({"max_new_tokens": 10**9}, "out of range"),
    ({"max_new_tokens": 600}, "was made for 512"),
    ({"max_new_tokens": 2.5}, "whole number"),
    ({"max_new_tokens": 4, "temperature": -1.0}, "temperature"),
    ({"max_new_tokens": 4, "top_p": 1.5}, "top_p"),
    ({"max_new_tokens": 4, "num_beams": 4}, "num_beams=4 is not supported"),
    ({"max_new_tokens": 4, "wings": 2}, "Unknown argument 'wings'"),
    ({"max_new_tokens": 4, "stop_strings": ["x"]}, "needs the tokenizer"),
    ({"max_new_tokens": 4, "input_ids": torch.zeros((1, 0), dtype=torch.long)}, "prompt is empty"),
    ({"max_new_tokens": 4, "input_ids": torch.tensor([[999]])}, "token id 999"),
    ({"max_new_tokens": 4, "input_ids": torch.ones(3)}, "shape"),
    ({"max_new_tokens": 4, "attention_mask": torch.tensor([[1] * 15 + [0]])}, "pad on the left"),
    ({"max_new_tokens": 4, "attention_mask": torch.zeros((1, 16))}, "all zero"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS)
def test_bad_calls_are_one_clear_error(
    tiny_llama: Tiny, arguments: dict[str, Any], message: str
) -> None:
    with hasten.apply(tiny_llama()) as plain, pytest.raises(HastenError, match=message) as caught:
        plain.generate(**({"input_ids": models.prompt()} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runner", ["eager", "compiled"])
def test_both_runners_give_the_ids_of_generate(tiny_llama: Tiny, runner: str) -> None:
    model = tiny_llama()
    inputs = models.padded([models.prompt(length=20)[0], models.prompt(length=9, seed=1)[0]])
    with hasten.apply(model, runner=runner) as plain:
        assert isinstance(plain, CausalModel)
        for new in (30, 8):
            assert torch.equal(
                plain.generate(**inputs, max_new_tokens=new), answer_of(model, inputs, new)
            )
        single = {"input_ids": models.prompt(length=11)}
        assert torch.equal(
            plain.generate(**single, max_new_tokens=30), answer_of(model, single, 30)
        )
