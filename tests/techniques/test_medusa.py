"""Medusa, by the checks of its sheet; the trained parts are those of a model of a few seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten.causal.acceptor.typical import best_paths, threshold
from hasten.causal.drafter.heads import (
    head_logits,
    head_states,
    last_states,
    rank_accuracy,
    untrained_heads,
)
from hasten.causal.drafter.medusa import Medusa
from hasten.causal.engine import CausalModel
from hasten.causal.run import Run
from hasten.causal.slots import Draft
from hasten.measure.stats import goodness_of_fit
from hasten.parts import model_hash
from hasten.technique import Loss, Parts
from tests import models
from tests.models import VOCABULARY
from tests.techniques.trained import held_out, preparation, trained_llama

PLANS = [
    "medusa",
    "medusa(num_nodes=1)",
    "medusa(num_nodes=20)",
    "medusa(tree=chain)",
    "medusa(tree=random, num_nodes=12)",
    "medusa(acceptance=typical)",  # at temperature zero the exact rule
]
NEVER = -1  # an end-of-text id that no model gives


def random_parts(model: PreTrainedModel, *, scale: float = 0.2, num_heads: int = 3) -> Parts:
    """Heads that nobody trained, and accuracies to match."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.hidden_size
    output = model.get_output_embeddings().weight.detach().float()
    return {
        "weight": torch.randn(num_heads, 2, size, size, generator=generator) * scale,
        "bias": torch.randn(num_heads, 2, size, generator=generator) * scale,
        "output": output + torch.randn(num_heads, *output.shape, generator=generator) * scale / 10,
        "accuracy": torch.rand(num_heads, 10, generator=generator) / 10,
    }


@contextmanager
def put(model: PreTrainedModel, plan: str, parts: Parts, **options: Any) -> Iterator[CausalModel]:
    with hasten.apply(model, plan, parts={"medusa": parts}, **options) as fast:
        yield fast


@cache
def trained_parts() -> Parts:
    return Medusa(num_heads=3).prepare(preparation(trained_llama(), steps=150))


def begun(fast: CausalModel, inputs: dict[str, Tensor], new: int = 40) -> Run:
    """A call whose prompt has been run, stopped before its first draft."""
    run = fast._run(
        inputs["input_ids"],
        inputs.get("attention_mask"),
        {"max_new_tokens": new, "eos_token_id": NEVER},
    )
    for technique, bound in run.slots.entries():
        run.states[id(technique)] = technique.begin(run, bound)
    run.prefill()
    return run


def several(rows: int = 3) -> dict[str, Tensor]:
    return models.padded([models.prompt(1, 9 + 4 * row, seed=row)[0] for row in range(rows)])


# ----------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("scale", [0.0, 0.2], ids=["untrained", "random"])
def test_greedy_ids_stay_the_same_with_any_tree(plan: str, scale: float) -> None:
    model = models.tiny_model()
    arguments = {"max_new_tokens": 24, "eos_token_id": NEVER}
    expected = model.generate(**several(), **arguments)
    with put(model, plan, random_parts(model, scale=scale)) as fast:
        assert torch.equal(fast.generate(**several(), **arguments), expected)
        assert fast.activity["medusa.drafted"] > 0
        for row in range(3):
            one = {"input_ids": models.prompt(1, 9 + 4 * row, seed=row)}
            assert torch.equal(
                fast.generate(**one, **arguments), model.generate(**one, **arguments)
            )


@pytest.mark.parametrize(
    "plan", ["medusa(num_nodes=7)", "medusa(num_nodes=20)", "medusa(tree=chain)"]
)
def test_two_hundred_prompts_give_the_same_ids_with_trained_heads(plan: str) -> None:
    model = trained_llama()
    ids = torch.cat([held_out(10, 24 + 4 * shift)[:, -24:] for shift in range(20)])
    assert ids.shape == (200, 24)
    expected = model.generate(ids, max_new_tokens=24, do_sample=False)
    with put(model, plan, trained_parts()) as fast:
        assert torch.equal(fast.generate(ids, max_new_tokens=24), expected)
        assert fast.activity["medusa.accepted"] > 200 * 8


@pytest.mark.parametrize(
    "family", ["gpt2", "qwen3", "mistral", "gemma3_text", "phi3", "gpt_neox", "mixtral"]
)
def test_other_families(family: str) -> None:
    model = models.tiny_model(family)
    expected = model.generate(**several(), max_new_tokens=16, eos_token_id=NEVER)
    with put(model, "medusa(num_nodes=9)", random_parts(model)) as fast:
        assert torch.equal(
            fast.generate(**several(), max_new_tokens=16, eos_token_id=NEVER), expected
        )


@pytest.mark.parametrize("plan", ["medusa(num_nodes=20)", "medusa(num_heads=6, tree=chain)"])
def test_a_draft_may_reach_beyond_the_last_position(plan: str) -> None:
    model = models.tiny_model("gpt2", max_position_embeddings=40)
    inputs = {"input_ids": models.prompt(2, 12)}
    expected = model.generate(**inputs, max_new_tokens=28, eos_token_id=NEVER)
    with put(model, plan, random_parts(model, num_heads=6)) as fast:
        assert torch.equal(fast.generate(**inputs, max_new_tokens=28, eos_token_id=NEVER), expected)


def test_an_end_of_text_inside_an_accepted_path_ends_the_row() -> None:
    model, ids = trained_llama(), held_out(4, 40)
    free = model.generate(ids, max_new_tokens=40, do_sample=False)
    for token in free[0, 45:60].tolist():
        arguments = {"max_new_tokens": 40, "eos_token_id": token, "pad_token_id": 0}
        expected = model.generate(ids, do_sample=False, **arguments)
        with put(model, "medusa(num_nodes=12)", trained_parts()) as fast:
            assert torch.equal(fast.generate(ids, **arguments), expected)


def test_a_penalty_counts_the_tokens_of_each_path() -> None:
    model = models.tiny_model()
    arguments = {"max_new_tokens": 24, "eos_token_id": NEVER, "repetition_penalty": 1.7}
    expected = model.generate(**several(), **arguments)
    with put(model, "medusa(num_nodes=12)", random_parts(model)) as fast:
        assert torch.equal(fast.generate(**several(), **arguments), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("batch", [1, 3])
def test_tree_logits_are_those_of_each_path_alone(family: str, batch: int) -> None:
    model, inputs = models.tiny_model(family), several(batch)
    with put(model, "medusa(num_nodes=14)", random_parts(model)) as fast:
        run = begun(fast, inputs)
        technique, state = run.slots.drafter[0], run.state(run.slots.drafter)
        draft = technique.propose(state, run)
        logits = run.forward(run.compose(draft)).logits
        assert logits.shape[1] == 15
        for row in range(batch):
            prompt = inputs["input_ids"][row, int(run.pads[row]) :]
            root = run.tokens[row, run.prompt_length : run.prompt_length + 1]
            for node in range(-1, 14):
                path = draft.tokens[row, draft.path(node)] if node >= 0 else draft.tokens[row, :0]
                alone = model(torch.cat((prompt, root, path))[None]).logits[0, -1]
                torch.testing.assert_close(logits[row, 1 + node], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tree", ["tuned", "random"])
def test_the_cache_after_commits_is_that_of_a_fresh_prompt(tree: str) -> None:
    model, ids = trained_llama(), held_out(1, 40)
    with put(model, f"medusa(num_nodes=14, tree={tree})", trained_parts()) as fast:
        run = begun(fast, {"input_ids": ids})
        while run.room() > 8:
            run.step()
        filled = int(run.lane.filled[0])
        assert run.activity["passes"] < run.activity["emitted"]
        with hasten_free(fast, model) as plain:
            fresh = begun(plain, {"input_ids": run.tokens[:, :filled]})
        for ours, theirs in zip(run.lane.cache.layers, fresh.lane.cache.layers, strict=True):
            assert ours.length == theirs.length == filled
            assert torch.equal(ours.positions, theirs.positions)
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=1e-5)


@contextmanager
def hasten_free(fast: CausalModel, model: PreTrainedModel) -> Iterator[CausalModel]:
    """The same model without a plan; a model carries one plan at a time."""
    fast.undo()
    with hasten.apply(model) as plain:
        yield plain


def test_bfloat16_runs_and_accepts() -> None:
    model = models.tiny_model(dtype=torch.bfloat16)
    with put(model, "medusa", untrained_parts(model)) as fast:
        out = fast.generate(**several(), max_new_tokens=24, eos_token_id=NEVER)
        assert out.shape == (3, 17 + 24) and fast.activity["medusa.drafted"] > 0
        (_, bound), *_ = fast.bound
        assert bound.weight.dtype == torch.bfloat16


def untrained_parts(model: PreTrainedModel, *, tied: bool = False) -> Parts:
    accuracy = random_parts(model)["accuracy"]
    return untrained_heads(model, 3, num_layers=2, tied=tied) | {"accuracy": accuracy}


@pytest.mark.parametrize("plan", ["medusa(num_nodes=6)", "medusa(tree=chain)"])
def test_sampling_keeps_the_distribution(plan: str) -> None:
    size, new, draws = 5, 3, 4000
    model = models.tiny_model(vocab_size=size, initializer_range=0.4)
    ids = models.prompt(1, 6, vocabulary=size)
    expected = torch.ones(1)
    sequences = ids
    for _ in range(new):  # the chance of every continuation, in the order of its ids
        probs = (model(sequences).logits[:, -1] / 0.8).softmax(dim=-1)
        expected = (expected[:, None] * probs).flatten()
        sequences = torch.cat(
            (
                sequences.repeat_interleave(size, 0),
                torch.arange(size).repeat(len(sequences))[:, None],
            ),
            dim=1,
        )
    parts = random_parts(model)
    parts["accuracy"] = parts["accuracy"][:, :size]
    with put(model, plan, parts) as fast:
        out = fast.generate(
            ids.expand(draws, -1),
            max_new_tokens=new,
            do_sample=True,
            top_k=0,
            temperature=0.8,
            seed=5,
            eos_token_id=NEVER,
        )
        assert fast.activity["medusa.accepted"] > draws / 20
    places = torch.tensor([size**2, size, 1])
    counts = torch.bincount((out[:, -new:] * places).sum(1), minlength=size**new)
    assert goodness_of_fit(counts.tolist(), expected.tolist()).passes()


# ------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "phi"])  # the LM head of Phi has a bias
def test_an_untrained_head_is_the_lm_head(family: str, tied: bool) -> None:
    model = models.tiny_model(family)
    hidden = last_states(model, models.prompt(2, 20))
    parts = untrained_parts(model, tied=tied)
    for index in range(3):
        states = head_states(hidden, parts["weight"][index], parts["bias"][index])
        assert torch.equal(states, hidden)
        logits = head_logits(model, parts, index, hidden)
        assert torch.equal(logits, model(models.prompt(2, 20)).logits)
    with put(model, f"medusa(tied={str(tied).lower()})", parts) as fast:
        run = begun(fast, several(2))
        (_, bound), *_ = fast.bound
        logits = bound.logits(run.last.hidden[:, -1])
        for head in range(logits.shape[1]):
            torch.testing.assert_close(
                logits[:, head], run.last.logits[:, -1], atol=1e-6, rtol=1e-6
            )


def test_training_leaves_the_model_as_it_is() -> None:
    model = models.tiny_model()
    before, hooks = model_hash(model), len(model.get_output_embeddings()._forward_pre_hooks)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parts = Medusa(num_heads=2).prepare(preparation(model, steps=3))
    assert model_hash(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert len(model.get_output_embeddings()._forward_pre_hooks) == hooks
    assert parts["weight"].abs().sum() > 0 and not parts["weight"].requires_grad
    assert {name: tuple(tensor.shape) for name, tensor in parts.items()} == {
        "weight": (2, 2, 32, 32), "bias": (2, 2, 32), "output": (2, VOCABULARY, 32), "accuracy": (2, 10),
    }  # fmt: skip


def test_training_repeats_itself() -> None:
    model = models.tiny_model()
    first, second = (Medusa().prepare(preparation(model, steps=3)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_heads_learn_the_token_that_they_are_for() -> None:
    model, parts = trained_llama(), trained_parts()
    crops = [held_out(12, 120)]
    right = rank_accuracy(model, crops, parts)[:, 0]
    for shift in (-1, 1):
        assert (right > rank_accuracy(model, crops, parts, shift=shift)[:, 0] + 0.1).all()
    untrained = rank_accuracy(model, crops, untrained_heads(model, 3))[:, 0]
    assert (right > untrained + 0.1).all()


# --------------------------------------------------------------------------------------- trees


def test_accepted_length_grows_with_nodes_and_stays_below_the_heads() -> None:
    model, ids = trained_llama(), held_out(1, 40)
    passes = []
    for num_nodes in (1, 3, 8, 24):
        with put(model, f"medusa(num_nodes={num_nodes})", trained_parts()) as fast:
            chunks = [
                chunk.numel() for chunk in fast.stream(ids, max_new_tokens=100, eos_token_id=NEVER)
            ]
            assert sum(chunks) == 100 and max(chunks) <= 1 + 3
            assert fast.activity["medusa.accepted"] == 100 - fast.activity["passes"]
            passes.append(fast.activity["passes"])
    assert passes == sorted(passes, reverse=True) and passes[-1] < passes[0] < 100


def test_the_tuned_tree_beats_random_trees_of_the_same_size() -> None:
    model, ids = trained_llama(), held_out(8, 40)
    passes = {}
    for tree in ("tuned", "random"):
        with put(model, f"medusa(num_nodes=8, tree={tree})", trained_parts()) as fast:
            fast.generate(ids, max_new_tokens=60, eos_token_id=NEVER)
            passes[tree] = fast.activity["medusa.accepted"]
    assert passes["tuned"] > 1.2 * passes["random"]


# --------------------------------------------------------------------------- typical acceptance


def test_eps_of_zero_takes_a_whole_path_every_time() -> None:
    model = models.tiny_model()
    with put(
        model, "medusa(acceptance=typical, eps=0.0, num_nodes=20)", random_parts(model)
    ) as fast:
        depth = fast.bound[0][1].tree.depth
        assert depth > 1
        chunks = list(
            fast.stream(
                models.prompt(1, 12), max_new_tokens=41, do_sample=True, top_k=0, eos_token_id=NEVER
            )
        )
        lengths = [chunk.numel() for chunk in chunks]
        assert sum(lengths) == 41 and set(lengths[1:-1]) == {1 + depth}


def test_eps_of_one_and_a_large_delta_take_nothing() -> None:
    model = trained_llama()
    with put(model, "medusa(acceptance=typical, eps=1.0, delta=1e9)", trained_parts()) as fast:
        fast.generate(
            held_out(2, 30), max_new_tokens=30, do_sample=True, seed=1, eos_token_id=NEVER
        )
        assert fast.activity["passes"] == 30 and "medusa.accepted" not in fast.activity


def test_typical_acceptance_keeps_more_than_exact_sampling() -> None:
    model, ids = trained_llama(), held_out(12, 40)
    accepted = {}
    for acceptance in ("exact", "typical"):
        with put(model, f"medusa(acceptance={acceptance})", trained_parts()) as fast:
            fast.generate(
                ids, max_new_tokens=40, do_sample=True, top_k=0, seed=1, eos_token_id=NEVER
            )
            accepted[acceptance] = fast.activity["medusa.accepted"]
    assert accepted["typical"] > accepted["exact"] > 0


def test_the_threshold_is_the_formula() -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    entropy = torch.tensor([0.8018185, 1.3862944, 0.0])
    for eps, delta in ((0.09, 0.3), (0.5, 0.3), (1.0, 2.0)):
        wanted = (delta * torch.exp(-entropy)).clamp(max=eps)
        torch.testing.assert_close(threshold(probs.log(), eps=eps, delta=delta), wanted)


def test_the_longest_path_wins_and_of_equal_ones_the_likeliest() -> None:
    draft = Draft(torch.zeros(4, 5, dtype=torch.long), (-1, -1, 0, 1, 1))
    kept = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1, 1, 1]]).bool()
    log_probs = torch.log(torch.tensor([0.3, 0.4, 0.9, 0.5, 0.6])).expand(4, -1)
    assert best_paths(draft, kept, log_probs) == [[1], [0, 2], [1, 4], []]


# ------------------------------------------------------------------------------------ the rest


def test_only_typical_acceptance_is_lossy() -> None:
    assert Medusa().loss_class() is Medusa.card.loss is Loss.EXACT
    assert Medusa(acceptance="typical").loss_class() is Loss.LOSSY


def test_parts_survive_the_disk(data_folder: Path) -> None:
    model, ids = trained_llama(), held_out(2, 40)
    technique = Medusa(num_heads=3, num_nodes=12)
    made = preparation(model, steps=150)
    hasten.prepare(model, technique, texts=made.texts, steps=1, tokenizer=made.subject.tokenizer)
    with hasten.apply(model, technique) as fast:
        assert torch.equal(
            fast.generate(ids, max_new_tokens=20),
            model.generate(ids, max_new_tokens=20, do_sample=False),
        )
