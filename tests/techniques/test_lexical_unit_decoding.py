"""Lexical unit decoding: what its description says, and what a wrong implementation would fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten.causal.emission.lexical_unit_decoding import LexicalUnitDecoding, State
from hasten.causal.emission.placeholder_training import Tuning, random_cuts, tune
from hasten.causal.emission.placeholders import (
    fresh_parts,
    matrices,
    merged,
    pack,
    placeholder_id,
    tuned_copy,
    wanted,
)
from hasten.causal.generation import Sampler, Settings
from hasten.causal.runners import Block, EagerRunner, Output
from hasten.causal.slots import Draft
from hasten.errors import PlanError
from hasten.parts import model_hash
from hasten.technique import Parts
from tests.models import EOS, FAMILIES, padded, prompt, tiny_model
from tests.techniques.trained import held_out, preparation, trained_llama

NAME = "lexical_unit_decoding"


def random_parts(model: PreTrainedModel, *, rank: int = 4, depth: int = 3) -> Parts:
    """Parts that change the model visibly, without training."""
    generator = torch.Generator().manual_seed(0)
    parts = fresh_parts(model, rank, generator)
    for name, tensor in parts.items():
        if name.endswith(".left"):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return parts | {"depth": torch.tensor(depth)}


@pytest.fixture(scope="module")
def trained_parts() -> Parts:
    """Parts of `trained_llama` after a few seconds of training."""
    return tune(preparation(trained_llama(), steps=120), depth=3, alpha=0.9, rank=8)


def generate(
    plan: str, parts: Parts, ids: Tensor, model: PreTrainedModel, **arguments: Any
) -> tuple[Tensor, dict[str, Any]]:
    """New ids, and the counters."""
    with hasten.apply(model, plan, parts={NAME: parts}) as fast:
        out = fast.generate(ids, **{"max_new_tokens": 40, **arguments})
        return out[:, ids.shape[1] :], fast.activity


# -- the tuned copy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_the_model_plus_its_updates(family: str) -> None:
    model = tiny_model(family)
    before = model_hash(model)
    parts = random_parts(model)
    twin = tuned_copy(model, parts)
    assert model_hash(model) == before
    names = matrices(model)
    assert names and not any("lm_head" in name or "embed_out" in name for name in names)
    theirs = dict(twin.named_parameters())
    for name, weight in names.items():
        update = parts[name + ".left"] @ parts[name + ".right"]
        assert torch.allclose(theirs[name], weight + update, atol=1e-6)
    assert twin.get_output_embeddings().weight is model.get_output_embeddings().weight
    assert twin.get_input_embeddings().weight.shape[0] == placeholder_id(model) + 1
    placeholder = torch.tensor([[1, 2, placeholder_id(model)]])
    assert twin(input_ids=placeholder).logits.shape[2] == model.config.vocab_size


def test_untrained_parts_change_nothing() -> None:
    model = tiny_model(tie_word_embeddings=True)
    for rank in (4, 0):
        twin = tuned_copy(model, fresh_parts(model, rank, torch.Generator()))
        assert torch.equal(twin(input_ids=prompt()).logits, model(input_ids=prompt()).logits)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_low_rank_parts_are_small() -> None:
    model = trained_llama()
    low, full = (fresh_parts(model, rank, torch.Generator()) for rank in (2, 0))
    count = {len(parts): sum(tensor.numel() for tensor in parts.values()) for parts in (low, full)}
    assert count[len(low)] < 0.1 * count[len(full)]


def test_applying_twice_reuses_the_copy_until_something_changes() -> None:
    model = tiny_model()
    technique, parts = LexicalUnitDecoding(), random_parts(model)
    first = technique.bind(model, parts).model
    assert technique.bind(model, dict(parts)).model is first
    assert technique.bind(model, random_parts(model, rank=3)).model is not first
    first = technique.bind(model, parts).model
    with torch.no_grad():
        model.get_decoder().norm.weight.mul_(2)
    assert technique.bind(model, parts).model is not first


# -- packed samples -----------------------------------------------------------------------------------------


def packed_logits(ids: Tensor, cuts: list[int], model: PreTrainedModel) -> Tensor:
    """Placeholder logits (batch, cuts, depth, vocabulary) of a packed sample, depth 3."""
    sample = pack(ids, cuts, 3, placeholder_id(model))
    tensors = merged(model, random_parts(model))
    with torch.no_grad():
        logits = Tuning(model, 3, 0.9).logits(tensors, sample)
    return logits[:, ids.shape[1] :].unflatten(1, (len(cuts), 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_sees_nothing_behind_its_cut(family: str) -> None:
    """The mask probe: with leaks here, training would learn to copy the answer."""
    model = tiny_model(family)
    ids, cuts = prompt(2, 24), [4, 9, 10, 18]
    before = packed_logits(ids, cuts, model)
    for index, cut in enumerate(cuts):
        for changed in (cut + 1, cut + 2):
            other = ids.clone()
            other[:, changed] = (other[:, changed] + 1) % 96
            after = packed_logits(other, cuts, model)
            assert torch.equal(before[:, : index + 1], after[:, : index + 1])
        other = ids.clone()
        other[:, cut] = (other[:, cut] + 1) % 96
        after = packed_logits(other, cuts, model)
        assert torch.equal(before[:, :index], after[:, :index])
        assert not torch.equal(before[:, index], after[:, index])


def test_cuts_do_not_see_each_other() -> None:
    model = tiny_model()
    ids = prompt(2, 24)
    together = packed_logits(ids, [4, 9, 10], model)
    for index, cut in enumerate([4, 9, 10]):
        assert torch.allclose(packed_logits(ids, [cut], model)[:, 0], together[:, index], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_are_what_decoding_sees(family: str) -> None:
    """A cut's placeholders get the logits that the engine gets when it decodes from there."""
    model = tiny_model(family)
    ids, cut = prompt(2, 24), 13
    runner = EagerRunner(tuned_copy(model, random_parts(model)))
    tokens = torch.cat((ids[:, : cut + 1], ids.new_full((2, 3), placeholder_id(model))), dim=1)
    positions = torch.arange(cut + 4).expand(2, -1)
    output = runner.forward(Block(tokens, positions, num_logits=3), runner.new_cache(2, 32))
    assert torch.allclose(output.logits, packed_logits(ids, [5, cut], model)[:, 1], atol=1e-5)


def test_pack() -> None:
    sample = pack(torch.tensor([[10, 11, 12, 13, 14, 15]]), [1, 2], 2, 99)
    assert sample.tokens.tolist() == [[10, 11, 12, 13, 14, 15, 99, 99, 99, 99]]
    assert sample.positions.tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 3, 4]]  # the true ones
    assert sample.targets.tolist() == [[3, 4], [4, 5]]
    seen = [row.nonzero().flatten().tolist() for row in sample.tree]
    assert seen[5] == [0, 1, 2, 3, 4, 5]
    assert seen[6:] == [[0, 1, 6], [0, 1, 6, 7], [0, 1, 2, 8], [0, 1, 2, 8, 9]]


def test_the_unit_and_the_token_that_ends_it_are_trained() -> None:
    easy = torch.tensor([[0, 0, 0, 1, 1, 0, 1, 1]]).bool()
    targets = torch.tensor([[2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7]])
    assert wanted(easy, targets)[0].long().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]


def test_labels_are_the_untuned_models_confidence() -> None:
    model, ids = trained_llama(), held_out(2, 60)
    easy = Tuning(model, 3, 0.9).easy(ids)
    probs = model(input_ids=ids).logits.softmax(dim=-1)
    assert not easy[:, 0].any()
    for t in range(1, 60):
        assert easy[0, t] == (probs[0, t - 1, ids[0, t]] >= 0.9)
    assert 0.3 < easy.float().mean() < 0.99


def test_random_cuts_leave_room_for_their_targets() -> None:
    cuts = random_cuts(20, 3, torch.Generator().manual_seed(0))
    assert len(cuts) == 6 and cuts.unique().numel() == 6
    for seed in range(50):
        assert int(random_cuts(20, 3, torch.Generator().manual_seed(seed)).max()) + 4 < 20


# -- the rule of acceptance ---------------------------------------------------------------------------------


def verdict(guesses: list[list[tuple[int, float]]], **knobs: Any) -> list[list[int]]:
    """Tokens emitted for rows of (token, confidence): first the ordinary prediction, then placeholders."""
    logits = torch.zeros(len(guesses), len(guesses[0]), 96)
    for row, line in enumerate(guesses):
        for column, (token, sure) in enumerate(line):
            logits[row, column] = torch.log(torch.tensor((1 - sure) / 95))
            logits[row, column, token] = torch.log(torch.tensor(sure))
    batch, depth = len(guesses), len(guesses[0]) - 1
    settings = Settings(max_new_tokens=99)
    run: Any = SimpleNamespace(
        tokens=torch.zeros(batch, 8, dtype=torch.long),
        sampler=Sampler(settings, torch.device("cpu")),
    )
    run.node_scores = lambda draft, logits: logits
    draft = Draft.chain(torch.full((batch, depth), 96))
    technique = LexicalUnitDecoding(num_draft=depth, **knobs)
    return technique.accept(State(96), run, draft, Output(logits)).tokens.tolist()


def test_only_a_confident_prefix_is_kept() -> None:
    rows = [
        [(5, 0.3), (6, 0.95), (7, 0.92), (8, 0.99)],
        [(5, 0.9), (6, 0.95), (7, 0.5), (8, 0.99)],  # a gap ends it
        [(5, 0.9), (6, 0.89), (7, 0.99), (8, 0.99)],
    ]
    assert verdict(rows, threshold=0.9) == [[5, 6, 7, 8], [5, 6, -1, -1], [5, -1, -1, -1]]
    assert verdict(rows[1:], threshold=0.9) == [[5, 6], [5, -1]]
    assert verdict(rows, threshold=1.1) == [[5], [5], [5]]
    assert verdict(rows[2:], threshold=0.5) == [[5, 6, 7, 8]]


def test_a_placeholder_may_not_repeat_the_token_before_it() -> None:
    assert verdict([[(5, 0.9), (5, 0.99), (6, 0.99)]]) == [[5]]
    assert verdict([[(5, 0.9), (6, 0.99), (6, 0.99)]]) == [[5, 6]]
    assert verdict([[(5, 0.9), (6, 0.99), (5, 0.99)]]) == [[5, 6, 5]]


# -- decoding -----------------------------------------------------------------------------------------------


def test_above_one_it_is_the_tuned_models_greedy_decoding(trained_parts: Parts) -> None:
    model = trained_llama()
    ids = held_out(3, 50)
    twin = tuned_copy(model, trained_parts)
    expected = twin.generate(ids, max_new_tokens=40, pad_token_id=EOS)[:, 50:]
    found, activity = generate(f"{NAME}(threshold=1.5)", trained_parts, ids, model)
    assert torch.equal(found, expected)
    assert activity["passes"] == 40
    assert f"{NAME}.accepted" not in activity and activity[f"{NAME}.drafted"] > 0
    without, activity = generate(f"{NAME}(num_draft=0)", trained_parts, ids, model)  # k = 1
    assert torch.equal(without, expected)
    assert activity["passes"] == 40 and activity["positions"] == 50 + 39


@pytest.mark.parametrize("threshold", [0.0, 0.8, 1.5])
def test_no_placeholder_stays_in_the_cache(threshold: float, trained_parts: Parts) -> None:
    """The cache is that of a plain pass over what was emitted, and so are the positions."""
    model, ids = trained_llama(), held_out(1, 50)
    with hasten.apply(model, f"{NAME}(threshold={threshold})", parts={NAME: trained_parts}) as fast:
        run = fast._run(ids, None, {"max_new_tokens": 30})
        fast._execute(run)
        twin = fast.runner.model
    tokens = run.sequences()
    assert int(tokens.max()) < placeholder_id(model)
    cache = run.lane.cache
    length = cache.layers[0].length
    assert cache.layers[0].positions[0, 0].tolist() == list(range(length))
    assert 80 - 4 <= length < 80  # what the last pass emitted has not been run
    fresh = EagerRunner(twin).new_cache(1, 80)
    EagerRunner(twin).forward(Block(tokens[:, :length], torch.arange(length)[None]), fresh)
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-4)
        assert torch.allclose(ours.values, theirs.values, atol=1e-4)


def test_neutral_is_the_base_itself() -> None:
    model = tiny_model()
    knobs = ", ".join(f"{k}={v!r}" for k, v in LexicalUnitDecoding.card.neutral.items())  # type: ignore[union-attr]
    ids, continuation = prompt(2, 12), prompt(2, 8, seed=1)
    with hasten.apply(model) as base:
        expected = base.generate(ids, max_new_tokens=12)
        score = base.score(ids, continuation, logits=True).logits
    with hasten.apply(model, f"{NAME}({knobs})", parts={NAME: random_parts(model)}) as fast:
        assert torch.equal(fast.generate(ids, max_new_tokens=12), expected)
        assert torch.equal(fast.score(ids, continuation, logits=True).logits, score)


def test_faster_as_the_threshold_falls_and_better_as_it_rises(trained_parts: Parts) -> None:
    """Tokens per pass fall with the threshold; the original model finds the text likelier."""
    model, ids = trained_llama(), held_out(10, 60)
    passes, nll = [], []
    for threshold in (0.3, 0.6, 0.8, 0.9, 0.97, 1.5):
        single = [
            generate(f"{NAME}(threshold={threshold})", trained_parts, row[None], model)
            for row in ids
        ]
        passes.append(sum(activity["passes"] for _, activity in single))
        texts = torch.cat([found for found, _ in single])
        with torch.no_grad():
            logits = model(input_ids=torch.cat((ids, texts), dim=1)).logits[:, 59:-1]
        nll.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts.flatten())))
    assert passes == sorted(passes)
    assert passes[0] < 0.6 * passes[-1] and passes[3] < 0.9 * passes[-1]
    assert passes[-1] == 10 * 40
    assert nll[0] > nll[2] > nll[-1] - 0.02
    assert nll[0] > nll[-1] + 0.1


def accepted(model: PreTrainedModel, parts: Parts, *, threshold: float) -> Tensor:
    """(kept, right) over all placeholders of all cuts of unseen text, by the rule of decoding."""
    ids = held_out(12, 150)
    cuts = list(range(20, 145))
    sample = pack(ids, cuts, 3, placeholder_id(model))
    with torch.no_grad():
        logits = Tuning(model, 3, 0.9).logits(merged(model, parts), sample)[:, 150:]
    sure, guess = logits.softmax(dim=-1).unflatten(1, (len(cuts), 3)).max(dim=-1)
    kept = (sure >= threshold).long().cumprod(dim=2).bool()
    right = guess == ids[:, sample.targets]
    return torch.stack((kept.float().mean(), right[kept].float().mean()))


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.9])
def test_confidence_is_calibrated(threshold: float, trained_parts: Parts) -> None:
    kept, right = accepted(trained_llama(), trained_parts, threshold=threshold)
    assert kept > 0.1
    assert right >= threshold - 0.05


def test_the_untuned_model_is_sure_of_nonsense(trained_parts: Parts) -> None:
    """Were it right, placeholders would be reading the tokens that they are to predict.

    It may well accept more: a placeholder is nothing that it knows, so its confidence means nothing.
    """
    model, ids = trained_llama(), held_out(6, 60)
    untuned = fresh_parts(model, 4, torch.Generator())
    ours, theirs = (accepted(model, parts, threshold=0.9)[1] for parts in (trained_parts, untuned))
    assert ours > 0.85 and theirs < 0.6
    agreement = []
    for tuned, parts in ((True, trained_parts), (False, trained_parts)):
        wanted, _ = generate(f"{NAME}(tuned={tuned}, num_draft=0)", parts, ids, model)
        found, _ = generate(f"{NAME}(tuned={tuned})", parts, ids, model)
        agreement.append(float((found == wanted).float().mean()))
    assert agreement[0] > agreement[1] + 0.2


def test_rows_do_not_disturb_each_other(trained_parts: Parts) -> None:
    model = trained_llama()
    ids = held_out(3, 60)
    rows = [ids[0], ids[1, :35], ids[2, :48]]
    plan = f"{NAME}(threshold=0.7)"
    alone = [generate(plan, trained_parts, row[None], model)[0][0] for row in rows]
    with hasten.apply(model, plan, parts={NAME: trained_parts}) as fast:
        together = fast.generate(**padded(rows), max_new_tokens=40)[:, 60:]
        assert fast.activity[f"{NAME}.accepted"] > 5
    for one, both in zip(alone, together, strict=True):
        assert torch.equal(one, both)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_ends_where_it_should(family: str, dtype: torch.dtype) -> None:
    """At threshold 0 all placeholders count; the last ones stay inside what was asked for."""
    model = tiny_model(family, dtype=dtype, max_position_embeddings=32, eos_token_id=None)
    parts = random_parts(model)
    for new in (1, 2, 3, 7, 20):  # 20 fills the context to its end
        found, activity = generate(
            f"{NAME}(threshold=0.0)", parts, prompt(2, 12), model, max_new_tokens=new
        )
        assert found.shape == (2, new)
        assert activity["emitted"] == 2 * new
        assert activity["passes"] <= new


def test_a_stop_inside_a_unit_ends_the_row(trained_parts: Parts) -> None:
    model, ids = trained_llama(), held_out(1, 60)
    plan = f"{NAME}(threshold=0.5)"
    free, _ = generate(plan, trained_parts, ids, model)
    stop = int(free[0, 10])
    first = free[0].tolist().index(stop)
    found, _ = generate(plan, trained_parts, ids, model, eos_token_id=stop)
    assert found[0].tolist() == free[0, : first + 1].tolist()


def test_sampling_and_penalties_are_the_tuned_models(trained_parts: Parts) -> None:
    """Above 1 every token is an ordinary prediction, drawn and penalised as for the copy alone."""
    model, ids = trained_llama(), held_out(2, 40)
    twin = tuned_copy(model, trained_parts)
    for arguments in (
        {"do_sample": True, "temperature": 1.3, "seed": 3},
        {"repetition_penalty": 1.3},
    ):
        with hasten.apply(twin) as plain:
            expected = plain.generate(ids, max_new_tokens=30, **arguments)[:, 40:]
        found, _ = generate(
            f"{NAME}(threshold=1.5)", trained_parts, ids, model, max_new_tokens=30, **arguments
        )
        assert torch.equal(found, expected)
    first, activity = generate(
        f"{NAME}(threshold=0.7)", trained_parts, ids, model, repetition_penalty=1.3
    )
    assert activity["passes"] < 40 and first.shape == (2, 40)


def test_more_placeholders_than_were_trained_are_refused() -> None:
    model = tiny_model()
    with pytest.raises(
        PlanError, match=r"num_draft=5, but .* at most 3; lower it or prepare again"
    ):
        hasten.apply(model, f"{NAME}(num_draft=5)", parts={NAME: random_parts(model)})


def test_training_leaves_the_model_alone_and_full_rank_works() -> None:
    model = trained_llama()
    before, flags = model_hash(model), [p.requires_grad for p in model.parameters()]
    parts = tune(preparation(model, steps=2), depth=2, alpha=0.8, rank=0)
    assert model_hash(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert int(parts["depth"]) == 2
    found, _ = generate(f"{NAME}(num_draft=2)", parts, held_out(1, 30), model, max_new_tokens=10)
    assert found.shape == (1, 10)


def test_prepared_parts_are_found_again() -> None:
    model = tiny_model()
    ready = preparation(model)
    hasten.prepare(
        model, f"{NAME}(rank=2)", texts=ready.texts[:8], steps=1, tokenizer=ready.subject.tokenizer
    )
    with hasten.apply(model, f"{NAME}(rank=2, num_draft=1)") as fast:
        assert fast.generate(prompt(), max_new_tokens=4).shape[0] == 1
    with pytest.raises(PlanError, match="has no trained part"):
        hasten.apply(model, f"{NAME}(rank=3)")


@pytest.mark.zoo  # compiling takes a while; no zoo model is needed
def test_the_compiled_runner_gives_the_same_ids(trained_parts: Parts) -> None:
    model, ids = trained_llama(), held_out(1, 60)
    plan = f"{NAME}(threshold=0.7)"
    expected, eager = generate(plan, trained_parts, ids, model)
    with hasten.apply(model, plan, runner="compiled", parts={NAME: trained_parts}) as fast:
        found = fast.generate(ids, max_new_tokens=40)[:, 60:]
        assert torch.equal(found, expected)
        assert fast.activity["passes"] == eager["passes"]
