"""KV prediction: what its description says, and what a wrong implementation would fail."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

import hasten
from hasten.causal.prefill.prediction_training import Training, next_token_loss, train
from hasten.causal.prefill.predictor import (
    Predictor,
    auxiliary,
    kept_layers,
    layer_map,
    own_weights,
)
from hasten.causal.prefill.projections import caught, check, widths
from hasten.causal.runners import Block
from hasten.errors import SubjectError
from hasten.parts import model_hash
from hasten.technique import Parts, get
from tests.models import EOS, padded, prompt, tiny_model
from tests.techniques.trained import held_out, preparation, trained_llama

SUPPORTED = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "mixtral", "qwen3_moe"]
UNSUPPORTED = ["phi3", "gpt2", "gpt_neox"]


def identity_parts(model: PreTrainedModel) -> Parts:
    """The whole base as auxiliary, and maps that change nothing."""
    layers = model.config.num_hidden_layers
    parts = untrained_parts(model, share=1.0)
    for base, (key, value) in zip(range(layers), widths(model), strict=True):
        parts |= {f"key.{base}.weight": torch.eye(key), f"value.{base}.weight": torch.eye(value)}
        parts |= {f"key.{base}.bias": torch.zeros(key), f"value.{base}.bias": torch.zeros(value)}
    return parts


def untrained_parts(model: PreTrainedModel, share: float = 0.5, *, noise: float = 0.1) -> Parts:
    """Parts of the right shapes: the base's layers, and random maps."""
    aux = auxiliary(model, kept_layers(model.config.num_hidden_layers, share))
    parts: Parts = {f"aux.{name}": p.detach().clone() for name, p in own_weights(aux).items()}
    generator = torch.Generator().manual_seed(0)
    for base, sizes in enumerate(widths(model)):
        for side, size in zip(("key", "value"), sizes, strict=True):
            parts[f"{side}.{base}.weight"] = noise * torch.randn(size, size, generator=generator)
            parts[f"{side}.{base}.bias"] = noise * torch.randn(size, generator=generator)
    return parts


@pytest.fixture(scope="module")
def trained_parts() -> Parts:
    """Parts of `trained_llama` after a few seconds of training."""
    return train(preparation(trained_llama(), steps=40), 0.5)


def block_of(tokens: Tensor) -> Block:
    """A prompt without padding."""
    return Block(tokens, torch.arange(tokens.shape[1]).expand(tokens.shape[0], -1), is_prompt=True)


# -- the layers -----------------------------------------------------------------------------------------


def test_layers_are_evenly_spaced_and_mapped_to_the_nearest_before() -> None:
    assert kept_layers(8, 0.25) == [0, 4]
    assert kept_layers(8, 0.5) == [0, 2, 4, 6]
    assert kept_layers(8, 0.75) == [0, 1, 2, 4, 5, 6]
    assert kept_layers(8, 1.0) == list(range(8))
    assert kept_layers(8, 0.0) == [0]
    assert layer_map(8, [0, 4]) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert layer_map(8, [0, 1, 2, 4, 5, 6]) == [0, 1, 2, 2, 3, 4, 5, 5]


def test_the_auxiliary_shares_all_but_its_layers() -> None:
    base = tiny_model(num_hidden_layers=4)
    aux = auxiliary(base, [0, 2])
    assert aux.get_input_embeddings().weight is base.get_input_embeddings().weight
    assert aux.get_decoder().norm.weight is base.get_decoder().norm.weight
    assert base.config.num_hidden_layers == len(base.get_decoder().layers) == 4
    assert aux.config.num_hidden_layers == len(aux.get_decoder().layers) == 2
    assert [layer.self_attn.layer_idx for layer in aux.get_decoder().layers] == [0, 1]
    for own, index in zip(aux.get_decoder().layers, (0, 2), strict=True):
        theirs = base.get_decoder().layers[index].self_attn.q_proj.weight
        assert own.self_attn.q_proj.weight is not theirs
        assert torch.equal(own.self_attn.q_proj.weight, theirs)


# -- what would prove it wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED)
def test_identity_is_the_base(family: str) -> None:
    """The base as its own auxiliary with identity maps: norm and rotation are where they belong."""
    model = tiny_model(family)
    batch = padded([prompt(length=n, seed=n)[0] for n in (20, 1, 13)])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    continuation = prompt(3, 8, seed=5)
    with hasten.apply(model) as base:
        expected = base.score(ids, continuation, mask, logits=True).logits
    parts = {"kv_prediction": identity_parts(model)}
    with hasten.apply(model, "kv_prediction(aux_layers=1.0)", parts=parts) as fast:
        score = fast.score(ids, continuation, mask, logits=True)
    assert expected is not None and score.logits is not None
    assert (score.logits - expected).abs().max() < 1e-5
    assert score.activity["kv_prediction.tokens"] == 19 + 0 + 12


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_prompt_of_one_token_is_the_base_exactly(family: str) -> None:
    model = tiny_model(family)
    ids, continuation = prompt(2, 1), prompt(2, 6, seed=1)
    with hasten.apply(model) as base:
        expected = base.score(ids, continuation, logits=True)
    parts = {"kv_prediction": untrained_parts(model)}
    with hasten.apply(model, "kv_prediction", parts=parts) as fast:
        score = fast.score(ids, continuation, logits=True)
    assert torch.equal(score.logits, expected.logits)
    assert "kv_prediction.tokens" not in score.activity


def test_training_leaves_the_base_alone(trained_parts: Parts) -> None:
    model = trained_llama()
    before, flags = model_hash(model), [p.requires_grad for p in model.parameters()]
    parts = train(preparation(model, steps=2), 0.25)
    assert model_hash(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer.self_attn.k_proj._forward_hooks for layer in model.get_decoder().layers)
    assert all(tensor.dtype == torch.bfloat16 for tensor in parts.values())


def test_gradient_reaches_the_auxiliary_through_the_prediction_only() -> None:
    model = tiny_model(num_hidden_layers=4)
    training = Training.of(model, 0.5, aux_weight=0.0, kv_weight=0.0)
    ids = prompt(2, 24)
    weights = training.start([ids])
    for tensor in weights.values():
        tensor.requires_grad_(True)
    training.loss(weights, ids).backward()
    last = "aux.model.layers.1."
    for name in (
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
    ):  # behind the last projections
        assert weights[f"{last}{name}.weight"].grad is None
    for name in (
        f"{last}self_attn.k_proj",
        f"{last}self_attn.v_proj",
        "aux.model.layers.0.mlp.down_proj",
    ):
        assert weights[f"{name}.weight"].grad.abs().max() > 0  # type: ignore[union-attr]
    cut = {name: t.detach().clone() for name, t in weights.items()}
    for name in cut:
        if not name.startswith("aux.") and name.endswith("weight"):
            cut[name].zero_()  # the maps pass nothing on, so nothing comes back
    for tensor in cut.values():
        tensor.requires_grad_(True)
    training.loss(cut, ids).backward()
    for name, tensor in cut.items():
        if name.startswith("aux."):
            assert tensor.grad is None or tensor.grad.abs().max() == 0, name
    assert cut["key.3.bias"].grad.abs().max() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_prediction_is_causal(family: str) -> None:
    model = tiny_model(family)
    predictor = Predictor.build(model, 1.0, untrained_parts(model, 1.0))
    tokens = prompt(1, 20)
    other = tokens.clone()
    other[0, 8] = (other[0, 8] + 1) % 96
    first, second = predictor.predict(block_of(tokens)), predictor.predict(block_of(other))
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a[:, :, :8], b[:, :, :8])
            assert not torch.equal(a[:, :, 8], b[:, :, 8])
    assert not torch.equal(first[-1][0][:, :, 9:], second[-1][0][:, :, 9:])


def mean_nll(plan: str, parts: Parts, *, shuffle: bool = False) -> float:
    """Of 32 tokens behind prompts of 120, over unseen programs."""
    ids = held_out(12, 152)
    with hasten.apply(trained_llama(), plan, parts={"kv_prediction": parts}) as fast:
        if shuffle:
            fast.bound[0][1].layers.reverse()
        return float(fast.score(ids[:, :120], ids[:, 120:]).nll.mean())


def test_the_base_reads_the_prediction_and_a_wrong_layer_map_hurts(trained_parts: Parts) -> None:
    exact = mean_nll("", trained_parts)
    predicted = mean_nll("kv_prediction", trained_parts)
    shuffled = mean_nll("kv_prediction", trained_parts, shuffle=True)
    assert (
        predicted < exact + 0.1
    )  # below it even, where the auxiliary learned what the base had not
    assert shuffled > predicted + 0.3


def test_without_the_kv_loss_predictions_are_further_off(trained_parts: Parts) -> None:
    model = trained_llama()
    ids = held_out(8, 120)
    without = train(preparation(model, steps=40), 0.5, kv_weight=0.0)
    training = Training.of(model, 0.5)
    distance, loss = [], []
    for parts in (trained_parts, without):
        weights = {name: tensor.float() for name, tensor in parts.items()}
        with torch.no_grad():
            terms = [
                Training.of(model, 0.5, aux_weight=0.0, kv_weight=w).loss(weights, ids)
                for w in (0.0, 1.0)
            ]
        loss.append(float(terms[0]))
        distance.append(float(terms[1] - terms[0]))
    assert distance[1] > 1.2 * distance[0]
    assert abs(loss[1] - loss[0]) < 0.1
    assert training.layers == [0, 0, 1, 1]


def prefill_flops(model: PreTrainedModel, plan: str, parts: Parts, length: int = 96) -> int:
    """Operations of the prompt and one token."""
    with (
        hasten.apply(model, plan, parts={"kv_prediction": parts}) as fast,
        FlopCounterMode(display=False) as counter,
    ):
        fast.generate(prompt(1, length), max_new_tokens=1)
    return counter.get_total_flops()


def test_the_cost_follows_the_auxiliary_and_not_the_base() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 256}
    shallow, deep = (tiny_model(num_hidden_layers=n, **shape) for n in (8, 16))
    plans = {n: f"kv_prediction(aux_layers={n / 8})" for n in (2, 4, 8)}
    cost = {
        n: prefill_flops(shallow, plan, untrained_parts(shallow, n / 8))
        for n, plan in plans.items()
    }
    exact = {model: prefill_flops(model, "", {}) for model in (shallow, deep)}
    assert exact[deep] > 1.9 * exact[shallow]
    assert cost[2] < cost[4] < cost[8]
    assert cost[4] < 0.6 * exact[shallow]
    # Twice as deep a base with as many auxiliary layers costs two more small maps per layer, no more.
    maps = 8 * 2 * 2 * 32 * 32 * 95
    one_token = exact[deep] / 96  # the base reads the last token
    twice = prefill_flops(deep, "kv_prediction(aux_layers=0.25)", untrained_parts(deep, 0.25))
    assert twice - cost[4] < maps + 1.5 * one_token
    assert cost[8] - cost[4] > 3 * (twice - cost[4]) / 2


# -- in the engine --------------------------------------------------------------------------------------


def test_rows_do_not_disturb_each_other() -> None:
    """Padding, rows of one token and rows that end early change nothing for their neighbours."""
    model = tiny_model(num_hidden_layers=4)
    parts = {"kv_prediction": untrained_parts(model)}
    rows = [prompt(length=n, seed=n)[0] for n in (17, 1, 9, 2)]
    with hasten.apply(model, "kv_prediction", parts=parts) as fast:
        alone = [fast.generate(row[None], max_new_tokens=12) for row in rows]
        together = fast.generate(**padded(rows), max_new_tokens=12)
        assert fast.activity["kv_prediction.tokens"] == 16 + 0 + 8 + 1
    for one, row, both in zip(alone, rows, together, strict=True):
        new = one[0, len(row) :]
        assert torch.equal(new, both[17 : 17 + len(new)])


def test_the_cache_holds_the_prediction_and_then_the_bases_own_entries() -> None:
    model = tiny_model(num_hidden_layers=4)
    ids = prompt(1, 10)
    with hasten.apply(
        model, "kv_prediction", parts={"kv_prediction": untrained_parts(model)}
    ) as fast:
        run = fast._run(ids, None, {"max_new_tokens": 4})
        fast._execute(run)
        predicted = fast.bound[0][1].predict(block_of(ids[:, :-1]))
    cache = run.lane.cache
    assert (
        cache.block == 0 and cache.layers[0].length == 10 + 3
    )  # the newest token is still to be run
    assert cache.layers[0].positions[0, 0].tolist() == list(range(13))
    for layer, (key, value) in zip(cache.layers, predicted, strict=True):
        assert torch.equal(layer.keys[:, :, :9], key)
        assert torch.equal(layer.values[:, :, :9], value)


def test_it_changes_the_output_and_undo_brings_it_back() -> None:
    model = tiny_model()
    ids = prompt(2, 12)
    before = model.generate(ids, max_new_tokens=8)
    with hasten.apply(
        model, "kv_prediction", parts={"kv_prediction": untrained_parts(model)}
    ) as fast:
        assert not torch.equal(fast.generate(ids, max_new_tokens=8), before)
    assert torch.equal(model.generate(ids, max_new_tokens=8), before)


def test_bfloat16() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    parts = {"kv_prediction": identity_parts(model)}
    ids, continuation = prompt(2, 12), prompt(2, 6, seed=1)
    with hasten.apply(model) as base:
        expected = base.score(ids, continuation).nll
    with hasten.apply(model, "kv_prediction(aux_layers=1.0)", parts=parts) as fast:
        assert (fast.score(ids, continuation).nll - expected).abs().mean() < 0.1


def test_the_auxiliary_alone() -> None:
    """`decoder=aux` is the pruned model by itself: transformers generates the same with it."""
    model = trained_llama()
    parts = untrained_parts(model)
    ids = held_out(2, 30)
    aux = auxiliary(model, kept_layers(4, 0.5))
    expected = aux.generate(ids, max_new_tokens=10, pad_token_id=EOS)
    with hasten.apply(model, "kv_prediction(decoder=aux)", parts={"kv_prediction": parts}) as fast:
        assert torch.equal(fast.generate(ids, max_new_tokens=10), expected)


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_other_families_are_refused_in_one_line(family: str) -> None:
    model = tiny_model(family)
    for refused in (
        lambda: hasten.apply(model, "kv_prediction", parts={"kv_prediction": {}}),
        lambda: get("kv_prediction")().prepare(preparation(model, steps=1)),
    ):
        with pytest.raises(
            SubjectError, match=r"kv_prediction cannot run on .*; leave it out"
        ) as error:
            refused()
        assert "\n" not in str(error.value)


def test_a_family_that_makes_its_keys_otherwise_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The check compares with the model's own cache, so it needs no list of families."""
    model = tiny_model()
    attention = model.get_decoder().layers[1].self_attn
    forward = attention.forward

    def twisted(*args: object, **kwargs: object) -> object:
        cos, sin = kwargs["position_embeddings"]  # type: ignore[misc]
        kwargs["position_embeddings"] = (cos, -sin)
        return forward(*args, **kwargs)

    check(model)
    monkeypatch.setattr(attention, "forward", twisted)
    with pytest.raises(SubjectError, match="kv_prediction cannot run"):
        check(model)


def test_catching_stops_the_pass_early_and_leaves_no_hook() -> None:
    model = tiny_model()
    done: list[bool] = []
    handle = model.get_decoder().norm.register_forward_hook(lambda *_: done.append(True))
    with caught(model, stop=True) as early:
        model(input_ids=prompt(), use_cache=False)
    assert not done
    with caught(model) as whole:
        model(input_ids=prompt(), use_cache=False)
    handle.remove()
    assert done
    for a, b in zip(early, whole, strict=True):
        assert torch.equal(a.key, b.key) and torch.equal(a.value, b.value)  # type: ignore[arg-type]
    assert not any(m._forward_hooks for m in model.modules())


# -- on the trained zoo -----------------------------------------------------------------------------------


@pytest.mark.zoo
def test_time_to_first_token_falls_on_the_zoo(zoo: Callable[[str], Path]) -> None:
    subject = hasten.open_subject(zoo("code-lm"))
    ids = prompt(1, 1024, vocabulary=4000)
    seconds: dict[str, list[float]] = {"": [], "kv_prediction": []}
    parts = {"kv_prediction": untrained_parts(subject.model)}
    for _ in range(6):
        for plan, found in seconds.items():
            with hasten.apply(subject, plan, parts=parts) as fast:
                start = time.process_time()
                fast.generate(ids, max_new_tokens=1)
                found.append(time.process_time() - start)
    assert min(seconds["kv_prediction"]) < 0.75 * min(seconds[""])


def test_next_token_loss_is_the_models_own() -> None:
    model = tiny_model()
    ids = prompt(2, 10)
    output = model(input_ids=ids, labels=ids)
    assert torch.allclose(next_token_loss(output.logits, ids), output.loss)
