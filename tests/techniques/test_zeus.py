"""ZEUS: its schedule, its predictor and its polynomial beside the sheet's rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.gate.history import Nodes
from tests import pipelines
from tests.techniques.trajectories import (
    ddim,
    dpm,
    flow,
    gaussian,
    mixture,
    psnr,
    record,
    toy,
)


def noisy(sample: Tensor, timestep: float) -> Tensor:
    """Another output for every call, so that each can be told from the others."""
    generator = torch.Generator().manual_seed(int(timestep * 10))
    return 0.1 * torch.randn(sample.shape, generator=generator)


@pytest.mark.parametrize(
    ("interval", "most", "calls", "longest"),
    [(6, 2, 27, 2), (6, 4, 27, 4), (6, 6, 24, 5), (6, 8, 24, 5), (8, 8, 23, 7), (12, 12, 22, 11)],
)
def test_published_numbers_of_calls(interval: int, most: int, calls: int, longest: int) -> None:
    noted = record(
        toy(noisy, flow()),
        f"zeus(late_interval={interval}, max_skips={most})",
        num_inference_steps=50,
    )
    assert (noted.calls, noted.longest) == (calls, longest)
    assert noted.run.activity["skipped"] == 50 - calls
    assert all(noted.ran[:11]) and noted.ran[-1]


@pytest.mark.parametrize(
    ("share", "interval", "expected"), [(0.48, 6, 24), (0.5, 6, 24), (0.5, 4, 24), (0.4, 8, 24)]
)
def test_the_late_rule_begins_at_a_step_of_its_own(
    share: float, interval: int, expected: int
) -> None:
    """At a multiple of its interval, at which a call runs: then runs of skips stay whole."""
    plan = f"zeus(late={share}, late_interval={interval}, max_skips=12)"
    noted = record(toy(noisy, flow()), plan, num_inference_steps=50)
    late = [step for step in range(expected + 1, 45) if noted.ran[step]]
    assert late == [step for step in range(expected + 1, 45) if step % interval == 1]


@pytest.mark.parametrize("steps", [9, 10, 20, 37, 100])
def test_first_and_last_steps_always_run(steps: int) -> None:
    noted = record(toy(noisy, flow()), "zeus(start=0, end=1)", num_inference_steps=steps)
    assert all(noted.ran[:4]) and noted.ran[-1] and noted.calls < steps


def test_few_steps_are_left_alone() -> None:
    pipe = toy(noisy, flow())
    noted = record(pipe, "zeus(start=0, end=1)", num_inference_steps=8)
    assert torch.equal(noted.sample, record(pipe, num_inference_steps=8).sample)
    assert set(noted.run.activity) == {"calls", "rows", "steps"}


@pytest.mark.parametrize("family", ["dit", "cogview4"])
@pytest.mark.parametrize("knobs", ["skip=0", "end=0.0"])
def test_neutral_is_the_pipeline_itself(family: str, knobs: str) -> None:
    pipe = pipelines.tiny(family)
    expected = pipelines.picture(pipe(**pipelines.call(family, num_inference_steps=10)))
    with hasten.apply(pipe, f"zeus({knobs})") as fast:
        made = fast(**pipelines.call(family, num_inference_steps=10))
        assert "skipped" not in fast.activity
    assert torch.equal(pipelines.picture(made), expected)


def reference(outputs: list[Tensor | None]) -> list[Tensor]:
    """What each step's solver gets, by the sheet's step 3 and 4, from what the calls made."""
    given: list[Tensor] = []
    fresh: list[Tensor] = []
    skip = 0
    line = torch.zeros(())
    for output in outputs:
        if output is not None:
            fresh, skip = [output, *fresh[:1]], 0
            given.append(output)
            continue
        skip += 1
        if skip == 1:
            line = 2 * fresh[0] - fresh[1]
        given.append(line if skip % 2 else fresh[0])
    return given


@pytest.mark.parametrize("scheduler", [flow, ddim, dpm])
def test_skips_take_the_line_and_the_newest_output_by_turns(scheduler: Any) -> None:
    plan = "zeus(skip=11, period=12, late=1, max_skips=7)"
    noted = record(toy(noisy, scheduler()), plan, num_inference_steps=50)
    assert noted.longest == 7
    outputs = [step.output if step.ran else None for step in noted.steps]
    expected = reference(outputs)
    for step, wanted in zip(noted.steps, expected, strict=True):
        assert torch.equal(step.output, wanted), step.index
    second = next(i for i in range(50) if not noted.ran[i] and not noted.ran[i - 1])
    newest, before = (s.output for s in (noted.steps[second - 2], noted.steps[second - 3]))
    assert not torch.allclose(noted.steps[second].output, 3 * newest - 2 * before)
    counted = noted.run.activity
    assert counted["zeus.predicted"] + counted["zeus.reused"] == counted["skipped"]


def test_stateful_solvers_make_every_step() -> None:
    pipe = toy(mixture(kind=dpm()), dpm())
    noted = record(pipe, "zeus", num_inference_steps=50)
    assert pipe.scheduler.step_index == 50 and noted.run.activity["steps"] == 50


def affine(scheduler: Any, slope: float = 0.25, steps: int = 50) -> Any:
    """An output that grows by a fixed amount from step to step."""
    scheduler.set_timesteps(steps)
    places = {float(t): i for i, t in enumerate(scheduler.timesteps)}
    return lambda sample, t: torch.full_like(sample, 1.0 + slope * places[t])


def test_the_line_is_exact_for_neighbours_and_wrong_by_the_gap_else() -> None:
    noted = record(
        toy(affine(flow()), flow()), "zeus(period=2, skip=1, late=1)", num_inference_steps=50
    )
    skipped = [step for step in noted.steps if not step.ran]
    first, *rest = skipped
    assert torch.allclose(first.output, torch.full_like(first.output, 1.0 + 0.25 * first.index))
    for step in rest:  # fresh outputs two steps apart: the line rises by twice as much
        assert torch.allclose(step.output, torch.full_like(step.output, 1.25 + 0.25 * step.index))
    plan = "zeus(period=2, skip=1, late=1, by_gap=true)"
    exact = record(toy(affine(flow()), flow()), plan, num_inference_steps=50)
    for step in exact.steps:
        assert torch.allclose(step.output, torch.full_like(step.output, 1.0 + 0.25 * step.index))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_polynomial_through_some_nodes_is_exact_up_to_its_degree(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(count, 3, generator=generator, dtype=torch.float64)

    def value(place: float, degree: int) -> Tensor:
        powers = torch.tensor([(place / 10) ** k for k in range(degree + 1)], dtype=torch.float64)
        rows = torch.cat((weights, torch.ones(1, 3, dtype=torch.float64)))[: degree + 1]
        return powers @ rows

    for degree, exact in ((count - 1, True), (count, False)):
        nodes = Nodes(count)
        for place in (1, 7, 13, 19, 25):
            nodes.add(place, value(place, degree))
        assert len(nodes) == count
        for place in (26, 28, 30):
            assert torch.allclose(nodes.at(place), value(place, degree)) == exact


def cubic(scheduler: Any, steps: int = 50) -> Any:
    """The noise that speaks of a clean sample that is a cubic of the step."""
    scheduler.set_timesteps(steps)
    places = {float(t): i for i, t in enumerate(scheduler.timesteps)}

    def rule(sample: Tensor, t: float) -> Tensor:
        share = float(scheduler.alphas_cumprod[int(t)])
        place = places[t] / 50
        clean = 0.5 + place - 2 * place**2 + 1.5 * place**3
        return (sample - share**0.5 * clean) / (1 - share) ** 0.5

    return rule


@pytest.mark.parametrize("scheduler", [ddim, dpm])
def test_late_steps_follow_the_polynomial_of_the_clean_sample(scheduler: Any) -> None:
    pipe = toy(cubic(ddim()), scheduler())
    full = record(pipe, num_inference_steps=50)
    noted = record(pipe, "zeus(start=0.48)", num_inference_steps=50)
    assert noted.run.activity["zeus.interpolated"] == noted.run.activity["skipped"] == 17
    parabola = record(pipe, "zeus(start=0.48, terms_late=3)", num_inference_steps=50)
    for step, exact, bent in zip(full.steps, noted.steps, parabola.steps, strict=True):
        assert torch.allclose(exact.result, step.result, atol=1e-4)
        assert exact.ran or exact.index < 25 or not torch.allclose(bent.output, step.output)


def noise_reference(rule: Any, scheduler: Any, x: Tensor, interval: int) -> Any:
    """Steps 1 to 7 of the sheet for a noise model: the last sample, which steps ran, and the nodes."""
    scheduler.set_timesteps(50)
    shares = scheduler.alphas_cumprod
    fresh: list[Tensor] = []
    nodes: list[tuple[int, Tensor]] = []
    drop, skips, ran, line = False, 0, [], x
    for i, t in enumerate(scheduler.timesteps):
        a, s = float(shares[int(t)]) ** 0.5, (1 - float(shares[int(t)])) ** 0.5
        late = i - 1 >= 24  # the step before has decided
        ran.append(not drop)
        if not drop:
            skips, fresh = 0, [rule(x, float(t)), *fresh[:1]]
            output = fresh[0]
        elif late:
            clean = torch.zeros_like(x)
            for here, value in nodes:
                weight = 1.0
                for other, _ in nodes:
                    weight *= (i - other) / (here - other) if other != here else 1.0
                clean += weight * value
            output = (x - a * clean) / s
        else:
            line = 2 * fresh[0] - fresh[1] if skips == 1 else line
            output = line if skips % 2 else fresh[0]
        if i % interval == 1:
            nodes = [*nodes, (i, (x - s * output) / a)][-4:]
        x = scheduler.step(output, t, x, return_dict=False)[0]
        wanted = i % interval != 0 if i >= 24 else i % 3 in (0, 1)
        drop = wanted and 10 <= i < 45 and skips < 6
        skips = skips + 1 if drop else skips
        skips = skips if drop else 0
    return x, ran, [place for place, _ in nodes]


@pytest.mark.parametrize("scheduler", [ddim, dpm])
@pytest.mark.parametrize("interval", [6, 4])
def test_every_step_of_a_noise_model_is_the_sheets(scheduler: Any, interval: int) -> None:
    rule = mixture(kind=ddim())
    for seed in range(2):
        plan = f"zeus(late_interval={interval})"
        noted = record(toy(rule, scheduler()), plan, seed=seed, num_inference_steps=50)
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        expected, ran, nodes = noise_reference(rule, scheduler(), start, interval)
        assert noted.ran == ran
        assert [place for place, _ in noted.states[0].nodes.kept] == nodes
        assert torch.allclose(noted.sample, expected, atol=1e-3)


def test_flow_models_keep_the_line_late() -> None:
    noted = record(toy(noisy, flow()), "zeus", num_inference_steps=50)
    assert "zeus.interpolated" not in noted.run.activity


def test_no_more_is_kept_than_two_outputs_the_line_and_the_nodes() -> None:
    noted = record(toy(mixture(kind=ddim()), ddim()), "zeus", num_inference_steps=50)
    (state,) = noted.states
    assert len(state.fresh) == 2 and len(state.nodes) == 4
    held = [value for value in vars(state).values() if isinstance(value, Tensor)]
    assert len(held) <= 1  # the line


def test_the_history_begins_anew_where_the_size_changes() -> None:
    noted = record(toy(noisy, flow()), "zeus(late=1)", num_inference_steps=50, grow_at=20)
    assert noted.sample.shape[-1] == 16 and bool(noted.sample.isfinite().all())
    assert noted.ran[20] and noted.ran[21]  # two outputs of the new size


def test_interleaving_beats_following_the_line_in_long_runs() -> None:
    """At 24 calls of 50, or fewer in longer runs; the toy is smooth, so reuse comes close."""
    pipe = toy(mixture(), flow())
    full = record(pipe, num_inference_steps=50, batch=16).sample
    runs = "period=6, skip=5, late=1"
    found = {
        kind: psnr(
            record(
                pipe, f"zeus({runs}, predictor={kind})", num_inference_steps=50, batch=16
            ).sample,
            full,
        )
        for kind in ("interleave", "reuse", "extrapolate", "quadratic")
    }
    assert found["interleave"] > found["extrapolate"] > found["quadratic"], found


@pytest.mark.parametrize("family", ["dit", "cogview4", "flux", "sdxl", "ltx", "pixart"])
def test_both_branches_follow_one_decision(family: str) -> None:
    pipe = pipelines.tiny(family)
    with hasten.apply(pipe, "zeus") as fast:
        first = pipelines.picture(fast(**pipelines.call(family, num_inference_steps=10)))
        counted = dict(fast.activity)
        again = pipelines.picture(fast(**pipelines.call(family, num_inference_steps=10)))
    assert torch.equal(first, again) and bool(first.isfinite().all())
    assert counted["skipped"] > 0 and counted["steps"] == 10
    per_step = 2 if family in ("cogview4", "wan") else 1
    assert counted["calls"] % per_step == counted["skipped"] % per_step == 0
    assert counted["calls"] + counted["skipped"] == 10 * per_step


def test_pictures_to_begin_with_shorten_the_loop() -> None:
    """The share of steps is of those that the loop makes, and its last one runs."""
    noted = record(toy(noisy, dpm()), "zeus(end=1)", num_inference_steps=50, skipped=30)
    assert noted.run.first == 30 and noted.run.num_steps == 20
    assert noted.ran[-1] and not all(noted.ran)
    level = noted.run.level(noted.steps[0])
    share = float(noted.run.scheduler.alphas_cumprod[int(noted.steps[0].timestep)])
    assert level.alpha == pytest.approx(share**0.5, rel=1e-3)


def test_it_keeps_the_dtype() -> None:
    pipe = pipelines.tiny("pixart", dtype=torch.bfloat16)
    with hasten.apply(pipe, "zeus") as fast:
        made = pipelines.picture(fast(**pipelines.call("pixart", num_inference_steps=10)))
        assert fast.activity["zeus.interpolated"] > 0
    assert bool(made.isfinite().all())


def test_an_exact_gaussian_is_followed_closely() -> None:
    scheduler = ddim()
    pipe = toy(gaussian(scheduler), scheduler)
    full = record(pipe, num_inference_steps=50)
    noted = record(pipe, "zeus", num_inference_steps=50)
    assert noted.calls == 24 and psnr(noted.sample, full.sample) > 40
