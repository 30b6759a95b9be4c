"""The training loop: schedule, learning, resuming, stopping, refusing."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from hasten.errors import HastenError
from hasten.training import Settings, Stage, fit, next_token_loss
from hasten.training.loop import LossFunction, build_optimizers
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


def noisy_loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Next tokens under random weights, as random masks are: the generator is part of the state."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    losses = cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none")
    return (losses * torch.rand(losses.shape)).mean(), {}


def stopping_at(
    stop: int, loss_fn: LossFunction = next_token_loss, number: int = signal.SIGINT
) -> LossFunction:
    """A loss that sends this process a signal in the middle of step `stop`, counted from 1."""
    calls = 0

    def stopping(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        assert calls <= stop, "the step was the last"
        if calls == stop:
            os.kill(os.getpid(), number)
        return loss_fn(model, batch)

    return stopping


@pytest.mark.parametrize("stop", [7, 20, 33])
@pytest.mark.parametrize(
    ("loss_fn", "autocast", "number"),
    [
        (next_token_loss, False, signal.SIGINT),
        (noisy_loss, False, signal.SIGTERM),
        (noisy_loss, True, signal.SIGINT),
    ],
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, stop: int, loss_fn: LossFunction, autocast: bool, number: int
) -> None:
    settings = replace(SETTINGS, autocast=autocast)
    torch.manual_seed(1)
    whole = tiny_model()
    expected = fit(whole, counting_data(), settings, loss_fn, quiet=True)

    file = tmp_path / "state.safetensors"
    torch.manual_seed(1)
    stopped = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        fit(
            stopped,
            counting_data(),
            settings,
            stopping_at(stop, loss_fn, number),
            checkpoint=file,
            quiet=True,
        )
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    kept = load_file(file)
    for name, tensor in weights(stopped).items():  # the step was done, and it is what was kept
        assert torch.equal(kept[f"model.{name}"], tensor), name

    resumed = tiny_model(seed=5)  # whatever it held, the checkpoint decides
    torch.rand(3)  # whatever was drawn, too
    outcome = fit(
        resumed, counting_data(), settings, loss_fn, checkpoint=file, resume=True, quiet=True
    )
    assert outcome.losses == expected.losses
    assert outcome.tokens == settings.tokens and outcome.seconds > 0
    assert_equal(whole, resumed)


def test_stopped_several_times_it_is_still_the_same_run(tmp_path: Path) -> None:
    """Evaluations, too, are those of one run."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"score": float(model.get_parameter("model.norm.weight").sum())}

    options = {"evaluate": evaluate, "num_evaluations": 8, "quiet": True}
    whole = tiny_model()
    expected = fit(whole, counting_data(), SETTINGS, **options)
    file = tmp_path / "state.safetensors"
    for steps in (5, 1, 14, 7):  # the first and the third fall on an evaluation
        model = tiny_model(seed=9 if file.exists() else 0)
        stopping = stopping_at(steps)
        with pytest.raises(KeyboardInterrupt):
            fit(
                model,
                counting_data(),
                SETTINGS,
                stopping,
                checkpoint=file,
                resume=True,
                **options,
            )
    resumed = tiny_model(seed=9)
    outcome = fit(resumed, counting_data(), SETTINGS, checkpoint=file, resume=True, **options)
    assert outcome.losses == expected.losses and outcome.evaluations == expected.evaluations
    assert [entry["step"] for entry in outcome.evaluations] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert_equal(whole, resumed)


def test_without_a_checkpoint_it_stops_after_a_whole_step() -> None:
    stopped, short = tiny_model(), tiny_model()
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, counting_data(), SETTINGS, stopping_at(3), quiet=True)
    seen: list[dict[str, Tensor]] = []

    def noting(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        seen.append(weights(model))
        return next_token_loss(model, batch)

    fit(short, counting_data(), SETTINGS, noting, quiet=True)
    assert all(torch.equal(tensor, seen[3][name]) for name, tensor in weights(stopped).items())


def test_a_stop_in_the_last_step_finishes_the_run(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    whole, stopped = tiny_model(), tiny_model()
    fit(whole, counting_data(), SETTINGS, quiet=True)
    outcome = fit(stopped, counting_data(), SETTINGS, stopping_at(40), checkpoint=file, quiet=True)
    assert outcome.steps == 40
    assert_equal(whole, stopped)


def test_a_stop_during_an_evaluation_waits_for_it(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"

    def evaluate(model: nn.Module) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        return {"score": 1.0}

    with pytest.raises(KeyboardInterrupt):
        fit(
            tiny_model(),
            counting_data(),
            SETTINGS,
            checkpoint=file,
            evaluate=evaluate,
            num_evaluations=4,
            quiet=True,
        )
    with safe_open(file, framework="pt") as opened:
        kept = json.loads(opened.metadata()["outcome"])
    assert kept["steps"] == 10 and kept["evaluations"] == [{"step": 10.0, "score": 1.0}]


def test_a_thread_of_its_own_trains_too() -> None:
    """Only the main thread may listen to signals."""
    plain, threaded = tiny_model(), tiny_model()
    fit(plain, counting_data(), SETTINGS, quiet=True)
    before = signal.getsignal(signal.SIGINT)
    worker = threading.Thread(
        target=fit, args=(threaded, counting_data(), SETTINGS), kwargs={"quiet": True}
    )
    worker.start()
    worker.join()
    assert signal.getsignal(signal.SIGINT) == before
    assert_equal(plain, threaded)


def test_a_crash_loses_what_came_after_the_last_checkpoint_only(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    whole = tiny_model()
    expected = fit(whole, counting_data(), SETTINGS, quiet=True)
    calls = 0

    def crashing(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise RuntimeError("the disk is on fire")
        return next_token_loss(model, batch)

    with pytest.raises(RuntimeError, match="on fire"):
        fit(
            tiny_model(),
            counting_data(),
            SETTINGS,
            crashing,
            checkpoint=file,
            checkpoint_seconds=0.0,
            quiet=True,
        )
    resumed = tiny_model(seed=5)
    outcome = fit(resumed, counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)
    assert outcome.losses == expected.losses
    assert_equal(whole, resumed)


def test_a_checkpoint_that_is_cut_off_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(), counting_data(), SETTINGS, stopping_at(9), checkpoint=file, quiet=True)
    before = file.read_bytes()

    def cut(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half of a")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("hasten.training.loop.save_file", cut)
        fit(tiny_model(), counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)
    assert file.read_bytes() == before
    whole, resumed = tiny_model(), tiny_model(seed=5)
    fit(whole, counting_data(), SETTINGS, quiet=True)
    fit(resumed, counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)
    assert_equal(whole, resumed)


def test_a_process_that_is_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Without a moment to save anything, as when the power goes."""
    file = tmp_path / "state.safetensors"
    code = f"""
import time, torch
from pathlib import Path
from hasten.training import fit, next_token_loss
from tests.test_training_loop import SETTINGS, counting_data, tiny_model
torch.set_num_threads(1)
calls = 0
def slowing(model, batch):
    global calls
    calls += 1
    if calls == 8:
        print("now", flush=True)
        time.sleep(600)
    return next_token_loss(model, batch)
fit(tiny_model(), counting_data(), SETTINGS, slowing, checkpoint=Path({str(file)!r}),
    checkpoint_seconds=0.0, quiet=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"now\n"
        finally:
            process.kill()
    whole, resumed = tiny_model(), tiny_model(seed=5)
    expected = fit(whole, counting_data(), SETTINGS, quiet=True)
    outcome = fit(resumed, counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)
    assert outcome.losses == expected.losses
    assert_equal(whole, resumed)


def test_without_resume_a_checkpoint_is_written_over(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(), counting_data(), SETTINGS, stopping_at(9), checkpoint=file, quiet=True)
    whole, again = tiny_model(), tiny_model()
    fit(whole, counting_data(), SETTINGS, quiet=True)
    assert fit(again, counting_data(), SETTINGS, checkpoint=file, quiet=True).steps == 40
    assert_equal(whole, again)


# Mixed precision.


@pytest.mark.parametrize("autocast", [False, True])
def test_matrices_multiply_in_bf16_and_weights_stay_in_fp32(tmp_path: Path, autocast: bool) -> None:
    model = tiny_model()
    products: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _i, out: products.add(out.dtype))
    gradients: set[torch.dtype] = set()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: gradients.add(p.grad.dtype))
    file = tmp_path / "state.safetensors"
    settings = replace(SETTINGS, autocast=autocast)
    outcome = fit(model, counting_data(), settings, checkpoint=file, quiet=True)
    assert products == {torch.bfloat16 if autocast else torch.float32}
    assert gradients == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    kept = {name: tensor for name, tensor in load_file(file).items() if name != "rng"}
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert any(name.startswith("optimizer.momentum_buffer") for name in kept)
    assert outcome.final_loss < 0.5 * outcome.losses[0]
    # Weights as they are in bf16 would lose small updates.
    assert any(not torch.equal(p, p.bfloat16().float()) for p in model.parameters())


def test_mixed_precision_learns_what_full_precision_learns() -> None:
    losses = {}
    for autocast in (False, True):
        settings = replace(SETTINGS, autocast=autocast)
        losses[autocast] = fit(tiny_model(), counting_data(), settings, quiet=True).losses
    assert losses[True] != losses[False]
    for mixed, full in zip(losses[True], losses[False], strict=True):
        assert mixed == pytest.approx(full, abs=0.1)


# Progress.


def test_progress_is_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"evaluate": lambda model: {"score": 0.25}, "num_evaluations": 4, "label": "a run"}
    outcome = fit(tiny_model(), counting_data(), SETTINGS, **options)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/40", "10/40", "20/40", "30/40", "40/40"]
    assert [line.split()[3] for line in lines] == ["8", "8", "8", "16", "16"]  # the length
    last = sum(outcome.losses[-10:]) / 10
    assert f"loss {last:.3f} step 40 score 0.25" in lines[-1]
    assert all("tokens/s" in line for line in lines)


def test_progress_without_news_is_one_line_at_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(1000.0, step=1.0)
    monkeypatch.setattr("hasten.training.loop.time.monotonic", lambda: next(clock))
    fit(tiny_model(), counting_data(), SETTINGS)
    lines = capsys.readouterr().err.splitlines()
    assert 2 < len(lines) < 8


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny_model(), counting_data(), SETTINGS, evaluate=lambda model: {"a": 1.0}, quiet=True)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        "hasten.training.loop.Console",
        lambda **_: Console(file=screen, force_terminal=True, width=100, color_system=None),
    )
    fit(tiny_model(), counting_data(), SETTINGS, label="a run")
    shown = screen.getvalue()
    assert "a run" in shown and "40/40" in shown and "loss" in shown
    assert "tokens/s" not in shown and capsys.readouterr() == ("", "")
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(), counting_data(), SETTINGS, stopping_at(3), label="another")
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back


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


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    """Two runs of the same settings and shapes may still differ in what they learn, and how."""
    file = tmp_path / "state.safetensors"
    fit(tiny_model(), counting_data(), SETTINGS, checkpoint=file, of="a by plain loss", quiet=True)
    again = {"checkpoint": file, "resume": True, "quiet": True}
    with pytest.raises(HastenError, match="is of a by plain loss, and this run of a by another"):
        fit(tiny_model(), counting_data(), SETTINGS, of="a by another", **again)
    outcome = fit(tiny_model(), counting_data(), SETTINGS, of="a by plain loss", **again)
    assert outcome.steps == SETTINGS.num_steps


def test_what_was_trained_cannot_be_frozen_on_the_way(tmp_path: Path) -> None:
    file, model = tmp_path / "state.safetensors", tiny_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, counting_data(), SETTINGS, stopping_at(3), checkpoint=file, quiet=True)
    model.lm_head.weight.requires_grad_(False)
    with pytest.raises(HastenError, match="which is frozen now"):
        fit(model, counting_data(), SETTINGS, checkpoint=file, resume=True, quiet=True)


def test_a_checkpoint_holds_what_a_model_remembers_beside_its_weights(tmp_path: Path) -> None:
    class Normed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(1)
            self.register_buffer("scratch", torch.zeros(1), persistent=False)

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.norm(ids.float().reshape(-1, 1))
            return out

    def loss_fn(model: torch.nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, float]]:
        return (model(batch) - 1).square().mean(), {}

    torch.manual_seed(0)
    whole = Normed()
    expected = fit(whole, counting_data(), SETTINGS, loss_fn, quiet=True)
    file, options = tmp_path / "state.safetensors", {"quiet": True}
    with pytest.raises(KeyboardInterrupt):
        fit(
            Normed(),
            counting_data(),
            SETTINGS,
            stopping_at(7, loss_fn),
            checkpoint=file,
            **options,
        )
    assert {k for k in load_file(file) if k.startswith("buffer.")} == {
        "buffer.norm.running_mean",
        "buffer.norm.running_var",
        "buffer.norm.num_batches_tracked",
    }
    resumed = Normed()
    outcome = fit(
        resumed, counting_data(), SETTINGS, loss_fn, checkpoint=file, resume=True, **options
    )
    assert outcome.losses == expected.losses
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


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
