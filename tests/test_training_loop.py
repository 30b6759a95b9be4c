"""The training loop: schedule, learning, resuming, stopping, refusing."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.errors import HastenError
from hasten.training import Settings, Stage, fit, next_token_loss
from hasten.training.loop import build_optimizers
from hasten.training.memory import keep_freed_memory
from hasten.zoo.corpus import PackedTokens

VOCABULARY = 32
SETTINGS = Settings(
    tokens=40 * 64,
    batch_tokens=64,
    stages=(Stage(length=8, share=0.5), Stage(length=16, share=0.5)),
    matrix_lr=0.05,
    other_lr=0.03,
    autocast=False,
    compile=False,
)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def counting_data(seed: int = 0) -> PackedTokens:
    """Texts in which each token is the one before plus one: easy to learn."""
    files = [(torch.arange(100) + start) % VOCABULARY for start in range(0, 30, 3)]
    return PackedTokens([file.int() for file in files], seed=seed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    other = weights(second)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, other[name]), name


def test_learns() -> None:
    outcome = fit(tiny_model(), counting_data(), SETTINGS, quiet=True)
    assert outcome.steps == SETTINGS.num_steps == len(outcome.losses) == 40
    assert outcome.tokens == SETTINGS.tokens
    assert outcome.final_loss < 0.5 * outcome.losses[0]


def test_same_seed_same_weights() -> None:
    first, second = tiny_model(), tiny_model()
    for model in (first, second):
        fit(model, counting_data(), SETTINGS, quiet=True)
    assert_equal(first, second)
    other = tiny_model()
    fit(other, counting_data(seed=1), SETTINGS, quiet=True)
    assert any(not torch.equal(a, weights(other)[name]) for name, a in weights(first).items())


def test_evaluation_changes_nothing_and_ends_on_the_last_step() -> None:
    plain, watched = tiny_model(), tiny_model()
    fit(plain, counting_data(), SETTINGS, quiet=True)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        return {"score": 1.0}

    outcome = fit(
        watched, counting_data(), SETTINGS, evaluate=evaluate, num_evaluations=4, quiet=True
    )
    assert [entry["step"] for entry in outcome.evaluations] == [10, 20, 30, 40]
    assert_equal(plain, watched)


@pytest.mark.parametrize("stop", [7, 20, 33])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    whole = tiny_model()
    expected = fit(whole, counting_data(), SETTINGS, quiet=True)

    calls = 0

    def interrupting(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C in the middle of a step
        return next_token_loss(model, batch)

    file = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(), counting_data(), SETTINGS, interrupting, checkpoint=file, quiet=True)
    assert calls == stop
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]

    resumed = tiny_model(seed=5)  # whatever it held, the checkpoint decides
    outcome = fit(resumed, counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)
    assert outcome.losses == expected.losses
    assert_equal(whole, resumed)


def test_resuming_a_finished_run_does_nothing(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    model = tiny_model()
    fit(model, counting_data(), SETTINGS, checkpoint=file, quiet=True)
    again = tiny_model(seed=5)
    outcome = fit(again, counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)
    assert outcome.steps == 40
    assert_equal(model, again)


def test_signals_are_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(tiny_model(), counting_data(), replace(SETTINGS, tokens=128), quiet=True)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    fit(tiny_model(), counting_data(), SETTINGS, checkpoint=file, quiet=True)
    other = replace(SETTINGS, matrix_lr=0.02)
    with pytest.raises(HastenError, match="other settings"):
        fit(tiny_model(), counting_data(), other, checkpoint=file, resume=True, quiet=True)
    wider = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(HastenError, match="another shape"):
        fit(wider, counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(HastenError, match="cannot be read"):
        fit(tiny_model(), counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)


def test_loss_that_is_not_finite_stops_before_the_update() -> None:
    def broken(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = next_token_loss(model, batch)
        return loss * float("nan"), metrics

    model = tiny_model()
    before = weights(model)
    with pytest.raises(HastenError, match="step 0"):
        fit(model, counting_data(), SETTINGS, broken, quiet=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 63}, "less than one batch"),
        ({"tokens": -1}, "less than one batch"),
        ({"stages": (Stage(length=8, share=0.5),)}, "make 1"),
        ({"stages": ()}, "make 1"),
        ({"stages": (Stage(length=8, share=1.5), Stage(length=8, share=-0.5))}, "above 0"),
        ({"stages": (Stage(length=7, share=1.0),)}, "divide"),
        ({"stages": (Stage(length=0, share=1.0),)}, "divide"),
        ({"warmup_share": 0.5, "decay_share": 0.6}, "pass 1"),
        ({"warmup_share": -0.1}, "negative"),
    ],
)
def test_settings_refuse(change: dict[str, object], message: str) -> None:
    with pytest.raises(HastenError, match=message):
        replace(SETTINGS, **change)  # type: ignore[arg-type]


def test_stages_follow_each_other() -> None:
    places = [SETTINGS.place(step) for step in range(SETTINGS.num_steps)]
    assert places == [(8, step) for step in range(20)] + [(16, step) for step in range(20)]


def test_rate_rises_holds_and_falls_to_zero() -> None:
    settings = replace(SETTINGS, tokens=100 * 64, warmup_share=0.1, decay_share=0.5)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(rates[10:50]) == {1.0}
    assert rates[50:] == pytest.approx([(50 - i) / 50 for i in range(50)])


def test_muon_gets_the_hidden_matrices_only() -> None:
    model = tiny_model()
    muon, adam = build_optimizers(model, SETTINGS)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adam, torch.optim.AdamW)
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adam.param_groups for p in group["params"]}
    assert all("_proj" in name for name in hidden) and len(hidden) == 14
    assert hidden | rest == set(names.values()) and not hidden & rest


def test_windows_cover_an_epoch_once() -> None:
    data = PackedTokens([torch.arange(50), torch.arange(50, 97)])
    windows = torch.cat([data.batch(index, rows=3, length=8) for index in range(4)])
    assert windows.shape == (12, 9)
    assert windows[:, 1:].unique().numel() == 96  # each token is a target once, bar the first
    assert not torch.equal(windows, torch.cat([data.batch(i, 3, 8) for i in range(4, 8)]))
    assert torch.equal(data.batch(2, 3, 8), PackedTokens([*data._files]).batch(2, 3, 8))


def test_window_longer_than_the_corpus_is_refused() -> None:
    with pytest.raises(HastenError, match="fewer than one window"):
        PackedTokens([torch.arange(8)]).batch(0, 1, 8)


def test_keeping_memory_changes_no_result() -> None:
    plain, kept = tiny_model(), tiny_model()
    fit(plain, counting_data(), SETTINGS, quiet=True)
    with keep_freed_memory():
        fit(kept, counting_data(), SETTINGS, quiet=True)
    assert_equal(plain, kept)


# The running mean of the weights.


def test_average_trails_the_weights() -> None:
    plain, mean = tiny_model(), tiny_model()
    fit(plain, counting_data(), SETTINGS, quiet=True)
    seen: list[dict[str, Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(weights(model))
        return {}

    fit(
        mean,
        counting_data(),
        SETTINGS,
        average=0.9,
        evaluate=evaluate,
        num_evaluations=2,
        quiet=True,
    )
    # The mean is evaluated and left in the model, and learning goes on without it.
    assert all(torch.equal(tensor, seen[-1][name]) for name, tensor in weights(mean).items())
    name = "model.embed_tokens.weight"
    apart = (weights(mean)[name] - weights(plain)[name]).norm()
    moved = (weights(plain)[name] - weights(tiny_model())[name]).norm()
    assert 0 < apart < 0.5 * moved
    nothing = tiny_model()
    fit(nothing, counting_data(), SETTINGS, average=0.0, quiet=True)
    for key, tensor in weights(nothing).items():  # it forgets all but the last weights
        assert torch.allclose(tensor, weights(plain)[key], atol=1e-6), key


def test_average_resumes(tmp_path: Path) -> None:
    whole = tiny_model()
    fit(whole, counting_data(), SETTINGS, average=0.9, quiet=True)
    calls = 0

    def interrupting(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return next_token_loss(model, batch)

    file = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(
            tiny_model(),
            counting_data(),
            SETTINGS,
            interrupting,
            checkpoint=file,
            average=0.9,
            quiet=True,
        )
    resumed = tiny_model(seed=5)
    fit(
        resumed,
        counting_data(),
        SETTINGS,
        checkpoint=file,
        resume=True,
        average=0.9,
        quiet=True,
    )
    assert_equal(whole, resumed)


def test_average_refuses(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="average is 1"):
        fit(tiny_model(), counting_data(), SETTINGS, average=1.0, quiet=True)
    file = tmp_path / "state.safetensors"
    fit(tiny_model(), counting_data(), SETTINGS, checkpoint=file, quiet=True)
    with pytest.raises(HastenError, match="holds no mean"):
        fit(
            tiny_model(),
            counting_data(),
            SETTINGS,
            checkpoint=file,
            resume=True,
            average=0.9,
            quiet=True,
        )
