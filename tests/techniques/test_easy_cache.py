"""EasyCache: its gate beside a plain version of the sheet, and where skipping loses nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.gate.easy_cache import EasyCache, difference, shifted
from tests import pipelines
from tests.techniques.trajectories import ddim, flow, mixture, psnr, record, toy


def reference(
    rule: Any, scheduler: Any, x: Tensor, steps: int, tau: float, warmup: int
) -> tuple[Tensor, list[bool]]:
    """The sheet's steps 1 to 7, one after the other: the last sample, and which steps ran."""
    scheduler.set_timesteps(steps)
    err, k, x_prev, x_comp, o_comp, vector = 0.0, None, x, x, x, x
    computed, ran = False, []
    for i, t in enumerate(scheduler.timesteps):
        skip = False
        if i < warmup or i == steps - 1:
            err = 0.0
        elif k is not None:
            err += k * float((x - x_prev).abs().mean()) / float(o_comp.abs().mean())
            skip = err < tau
            err = err if skip else 0.0
        x_prev = x
        if skip:
            output = x + vector
        else:
            output = rule(x, float(t))
            if computed:
                k = float((output - o_comp).abs().mean()) / float((x - x_comp).abs().mean())
            vector, o_comp, x_comp, computed = output - x, output, x, True
        ran.append(not skip)
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x, ran


@pytest.mark.parametrize("tau", [0.01, 0.05, 0.1, 0.3])
@pytest.mark.parametrize("warmup", [1, 5])
def test_every_step_is_the_sheets(tau: float, warmup: int) -> None:
    for seed in (0, 1):
        plan = f"easy_cache(threshold={tau}, warmup={warmup / 50})"
        noted = record(toy(mixture(), flow()), plan, seed=seed, num_inference_steps=50)
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        expected, ran = reference(mixture(), flow(), start, 50, tau, warmup)
        assert noted.ran == ran
        assert torch.allclose(noted.sample, expected, atol=1e-5)
        activity = noted.run.activity
        assert all(ran[:warmup]) and ran[-1]
        assert activity["easy_cache.reused"] == activity["skipped"] == 50 - sum(ran)


@pytest.mark.parametrize("family", ["dit", "cogview4"])
@pytest.mark.parametrize("knobs", ["threshold=0.0", "warmup=1.0, threshold=9.0"])
def test_neutral_is_the_pipeline_itself(family: str, knobs: str) -> None:
    pipe = pipelines.tiny(family)
    expected = pipelines.picture(pipe(**pipelines.call(family, num_inference_steps=12)))
    with hasten.apply(pipe, f"easy_cache({knobs})") as fast:
        made = fast(**pipelines.call(family, num_inference_steps=12))
        assert "skipped" not in fast.activity
    assert torch.equal(pipelines.picture(made), expected)


def test_computed_steps_give_the_networks_own_output() -> None:
    pipe = toy(mixture(), flow())
    made: list[Tensor] = []
    rule = pipe.transformer.rule
    pipe.transformer.rule = lambda x, t: made.append(rule(x, t)) or made[-1]
    noted = record(pipe, "easy_cache(threshold=0.1)", num_inference_steps=50)
    computed = [step.output for step in noted.steps if step.ran]
    assert len(computed) == len(made) < 50
    assert all(torch.equal(a, b) for a, b in zip(computed, made, strict=True))


@pytest.mark.parametrize("tau", [0.05, 1.0, 1e9])
def test_an_output_that_adds_a_constant_is_never_wrong(tau: float) -> None:
    pipe = toy(lambda x, t: x + 0.5, flow())
    full = record(pipe, num_inference_steps=50)
    noted = record(pipe, f"easy_cache(threshold={tau})", num_inference_steps=50)
    assert noted.run.activity["skipped"] > 5
    assert torch.allclose(noted.sample, full.sample, rtol=1e-5, atol=1e-6)
    held = record(pipe, f"easy_cache(threshold={tau}, keep=output)", num_inference_steps=50)
    assert not torch.allclose(held.sample, full.sample, rtol=1e-2)


@pytest.mark.parametrize("factor", [0.7, -1.3])
def test_a_linear_output_has_its_factor_as_rate(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = toy(lambda x, t: factor * x, flow())
    rates, changes = [], []

    def decide(self: EasyCache, state: Any, run: Any, call: Any) -> bool:
        if state.rate is not None and state.before is not None:
            moved = float((call.x - state.before).abs().mean()) / state.size
            true = float((factor * (call.x - state.before)).abs().mean()) / state.size
            changes.append((state.rate * moved, true))
        rates.append(state.rate)
        return original(self, state, run, call)

    original = EasyCache.decide
    monkeypatch.setattr(EasyCache, "decide", decide)
    record(pipe, "easy_cache(warmup=0.04, threshold=0.1)", num_inference_steps=50)
    # The gate is not asked at the first step; from the third on it knows the rate of the first two.
    assert rates[0] is None or len(rates) == 49
    assert all(rate == pytest.approx(abs(factor), rel=1e-3) for rate in rates[-48:])
    assert len(changes) == 48 and all(a == pytest.approx(b, rel=1e-3) for a, b in changes)


def test_calls_fall_and_error_rises_with_the_threshold() -> None:
    pipe = toy(mixture(), flow())
    full = record(pipe, num_inference_steps=50, batch=16).sample
    calls, quality = [], []
    for tau in (0.01, 0.02, 0.05, 0.1, 0.2):
        noted = record(pipe, f"easy_cache(threshold={tau})", num_inference_steps=50, batch=16)
        calls.append(noted.calls)
        quality.append(psnr(noted.sample, full))
    assert calls == sorted(calls, reverse=True) and calls[0] > calls[-1]
    assert quality == sorted(quality, reverse=True)


def test_which_steps_run_depends_on_the_sample_and_the_threshold() -> None:
    pipe = toy(mixture(), flow())
    by_seed = {
        tuple(record(pipe, "easy_cache", seed=seed, num_inference_steps=50).ran)
        for seed in range(8)
    }
    by_threshold = {
        tuple(record(pipe, f"easy_cache(threshold={t})", num_inference_steps=50).ran)
        for t in (0.02, 0.05, 0.1)
    }
    assert len(by_seed) > 1 and len(by_threshold) == 3


def test_the_expected_change_is_forgotten_when_a_call_runs() -> None:
    noted = record(toy(mixture(), flow()), "easy_cache(threshold=0.1)", num_inference_steps=50)
    lengths, count = [], 0
    for ran in noted.ran[6:]:
        if ran:
            lengths.append(count)
        count = 0 if ran else count + 1
    assert max(lengths) > 1 and len(set(lengths)) > 1


def test_keeping_the_vector_beats_keeping_the_output_where_outputs_follow_inputs() -> None:
    """The method's premise: what a call adds to its input changes slowly."""
    slow = mixture()
    pipe = toy(lambda x, t: x + 0.1 * slow(x, t), flow())
    full = record(pipe, num_inference_steps=50, batch=16).sample
    plan = "easy_cache(threshold=0.1"
    kept = record(pipe, f"{plan})", num_inference_steps=50, batch=16)
    held = record(pipe, f"{plan}, keep=output)", num_inference_steps=50, batch=16)
    assert kept.calls <= held.calls < 40
    assert psnr(kept.sample, full) > psnr(held.sample, full) + 6
    fewer = record(pipe, num_inference_steps=kept.calls, batch=16)
    assert psnr(kept.sample, full) > psnr(fewer.sample, full) + 2


def test_each_call_of_a_step_keeps_a_vector_of_its_own() -> None:
    pipe = pipelines.tiny("cogview4")
    with hasten.apply(pipe, "easy_cache(threshold=1.0)") as fast:
        run = fast.start()
        fast._execute(run, **pipelines.call("cogview4", num_inference_steps=12))
        (state,) = run.states.values()
        assert set(state.vectors) == {0, 1}
        assert not torch.equal(state.vectors[0], state.vectors[1])
        counted = run.activity
    assert counted["skipped"] == 2 * counted["easy_cache.reused"] > 0


def test_steps_are_counted_and_not_calls_where_a_branch_is_left_out() -> None:
    """One decision a step: the same steps run, whether one call is made at each or two."""
    pipe, ran = pipelines.tiny("cogview4"), []
    for plan in ("", ", adaptive_guidance(threshold=-1.0)"):
        with hasten.apply(pipe, f"easy_cache(threshold=1e9, warmup=0.25){plan}") as fast:
            run = fast.start()
            run.trace = []
            fast._execute(run, **pipelines.call("cogview4", num_inference_steps=12))
            ran.append([step.ran for step in run.trace])
    assert ran[0] == ran[1] == [True] * 3 + [False] * 8 + [True]


def test_vectors_of_other_channels() -> None:
    given = torch.randn(2, 4, 3, 3)
    for shape in ((2, 4, 3, 3), (2, 8, 3, 3), (2, 2, 3, 3)):
        output = torch.randn(shape)
        vector = difference(output, given)
        assert torch.allclose(shifted(vector, given), output, atol=1e-6)
        moved = shifted(vector, given + 1.0)
        common = min(shape[1], 4)
        assert torch.allclose(moved[:, :common], output[:, :common] + 1.0, atol=1e-6)
        assert torch.equal(moved[:, 4:], output[:, 4:])


def test_a_network_that_makes_something_else_is_named() -> None:
    with pytest.raises(hasten.errors.SubjectError, match="use zeus"):
        difference(torch.zeros(2, 4), torch.zeros(2, 4, 1))


def test_state_begins_anew_with_each_call_and_size() -> None:
    pipe = toy(mixture(), flow())
    plan = "easy_cache(threshold=0.2)"
    with hasten.apply(pipe, plan) as fast:
        made = [
            fast(num_inference_steps=50, generator=torch.Generator().manual_seed(3))[0]
            for _ in range(2)
        ]
    assert torch.equal(*made)
    grown = record(toy(lambda x, t: 0.3 * x, flow()), plan, num_inference_steps=50, grow_at=20)
    assert grown.ran[20] and grown.ran[21] and not all(grown.ran)


def test_epsilon_models_and_bfloat16_work_too() -> None:
    scheduler = ddim()
    pipe = toy(mixture(kind=scheduler), scheduler)
    full = record(pipe, num_inference_steps=50)
    noted = record(pipe, "easy_cache(threshold=0.05)", num_inference_steps=50)
    assert noted.calls < 50 and psnr(noted.sample, full.sample) > 20
    pipe = pipelines.tiny("pixart", dtype=torch.bfloat16)
    with hasten.apply(pipe, "easy_cache(threshold=1.0)") as fast:
        made = pipelines.picture(fast(**pipelines.call("pixart", num_inference_steps=12)))
        assert fast.activity["skipped"] > 0
    assert bool(made.isfinite().all())
