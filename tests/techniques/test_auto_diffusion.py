"""AutoDiffusion: the search beside chance, and a solver whose coefficients follow the gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hasten
from hasten.denoise.run import Run, Slots
from hasten.denoise.schedule.auto_diffusion import AutoDiffusion, Fitness, frechet
from hasten.denoise.schedule.evolution import Evolution, Genome
from hasten.denoise.schedule.grid import set_grid, sigma_of, time_of, times
from hasten.denoise.slots import Schedule
from hasten.errors import HastenError, PlanError, SubjectError
from hasten.preparation import Preparation
from hasten.subject import open_subject
from hasten.technique import Card, Contract, Loss
from tests import pipelines
from tests.pipelines import picture, tiny

STEPS = 4


def call(family: str, **more: Any) -> dict[str, Any]:
    return pipelines.call(family, **({"num_inference_steps": STEPS} | more))


class Fixed(Schedule):
    """Walks a list that it is given."""

    name = "fixed"
    card = Card(title="fixed", family="", loss=Loss.LOSSY)
    contract = Contract(slots=())

    def __init__(self, wanted: list[float] | None) -> None:
        self.wanted = wanted

    def plan(self, state: Any, run: Run) -> None:
        if self.wanted is not None:
            set_grid(run, self.wanted)


def walked(pipe: Any, wanted: list[float] | None, family: str, **more: Any) -> tuple[Tensor, Run]:
    run = Run(pipe, Slots(schedule=(Fixed(wanted), None)))
    run.trace = []
    with run.attached():
        return picture(pipe(**call(family, **more))), run


# ---------------------------------------------------------------------------------------- the gaps
SCHEDULERS = {
    "DDIMScheduler": "unet",
    "DDPMScheduler": "unet",
    "DPMSolverMultistepScheduler": "unet",
    "UniPCMultistepScheduler": "unet",
    "EulerDiscreteScheduler": "unet",
    "DEISMultistepScheduler": "unet",
    "LCMScheduler": "unet",
    "CogVideoXDDIMScheduler": "cogvideox",
    "FlowMatchEulerDiscreteScheduler": "cogview4",
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_schedulers_own_list_changes_nothing(name: str) -> None:
    family = SCHEDULERS[name]
    pipe = tiny(family, scheduler=name)
    plain, run = walked(pipe, None, family)
    again, _ = walked(pipe, times(run.scheduler), family)
    assert torch.equal(plain, again)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_levels_of_its_own_list_are_found_again(name: str) -> None:
    """Written down by our formulas, the very levels that the scheduler wrote come out."""
    pipe = tiny(SCHEDULERS[name], scheduler=name)
    _, run = walked(pipe, None, SCHEDULERS[name])
    sigmas = getattr(run.scheduler, "sigmas", None)
    if sigmas is None:
        pytest.skip("has no list of levels")
    for time, sigma in zip(times(run.scheduler), sigmas[:-1].tolist(), strict=True):
        assert sigma_of(run.scheduler, time) == pytest.approx(sigma, rel=1e-3)
        if name.startswith("Flow"):
            assert time_of(run.scheduler, sigma) == pytest.approx(time, rel=1e-4)


def ddim(output: Tensor, sample: Tensor, here: float, after: float) -> Tensor:
    """The sheet's solver: from share of signal `here` to `after`."""
    clean = (sample - (1 - here) ** 0.5 * output) / here**0.5
    return after**0.5 * clean + (1 - after) ** 0.5 * output


@pytest.mark.parametrize("family", ["unet", "cogvideox"])
def test_ddim_takes_steps_of_uneven_length(family: str) -> None:
    pipe = tiny(family)
    wanted = [905.0, 880.0, 312.0, 47.0]
    _, run = walked(pipe, wanted, family)
    products = run.scheduler.alphas_cumprod
    shares = [float(products[int(t)]) for t in wanted] + [float(run.scheduler.final_alpha_cumprod)]
    assert run.trace is not None and len(run.trace) == 4
    for step in run.trace:
        if family == "unet":
            expected = ddim(step.output, step.sample, shares[step.index], shares[step.index + 1])
        else:  # predicts v
            a, b = shares[step.index] ** 0.5, (1 - shares[step.index]) ** 0.5
            clean = a * step.sample - b * step.output
            noise = a * step.output + b * step.sample
            after = shares[step.index + 1]
            expected = after**0.5 * clean + (1 - after) ** 0.5 * noise
            if run.scheduler.config.prediction_type == "epsilon":
                expected = ddim(step.output, step.sample, *shares[step.index : step.index + 2])
        torch.testing.assert_close(step.result, expected, atol=1e-4, rtol=1e-4)
    assert type(run.scheduler.num_inference_steps) is int


def test_euler_and_flows_take_steps_of_uneven_length() -> None:
    for family, name in (("unet", "EulerDiscreteScheduler"), ("cogview4", None)):
        pipe = tiny(family, **({"scheduler": name} if name else {}))
        wanted = [910.0, 640.0, 600.0, 30.0]
        _, run = walked(pipe, wanted, family)
        levels = [sigma_of(run.scheduler, t) for t in wanted] + [0.0]
        if family == "unet":
            share = run.scheduler.alphas_cumprod[[910, 640, 600, 30]].double()
            expected = ((1 - share) / share) ** 0.5
            torch.testing.assert_close(torch.tensor(levels[:4]).double(), expected)
        assert run.trace is not None
        for step in run.trace:
            moved = step.sample + (levels[step.index + 1] - levels[step.index]) * step.output
            torch.testing.assert_close(step.result, moved, atol=1e-3, rtol=1e-3)


def test_schedulers_that_cannot_follow_are_refused() -> None:
    for name in ("PNDMScheduler", "HeunDiscreteScheduler"):
        with pytest.raises(SubjectError, match="other timesteps"):
            walked(tiny("unet", scheduler=name), [900.0, 500.0], "unet")


# --------------------------------------------------------------------------------------- the search
TARGET = (930.0, 700.0, 240.0, 60.0)
UNIFORM = (999.0, 749.0, 499.0, 249.0)


def worth(genome: Genome) -> float:
    return sum(abs(a - b) / 100 for a, b in zip(genome, TARGET, strict=True))


def evolved(seed: int, *, generations: int = 8, population: int = 20) -> Evolution:
    evolution = Evolution(worth, 1000, 0, torch.Generator().manual_seed(seed))
    evolution.look(evolution.first(UNIFORM, population))
    for _ in range(generations):
        evolution.look(evolution.next(population, population // 5))
    return evolution


def test_lists_are_distinct_fall_and_are_never_judged_twice() -> None:
    asked: list[Genome] = []
    evolution = evolved(0)
    evolution.fitness = lambda genome: asked.append(genome) or worth(genome)  # type: ignore[func-returns-value]
    evolution.look(evolution.next(20, 4))
    assert len(asked) == len(set(asked)) == 20
    for genome in evolution.found:
        assert len(set(genome)) == 4 and list(genome) == sorted(genome, reverse=True)
        assert all(0 <= t < 1000 and t == int(t) for t in genome)
    assert UNIFORM in evolution.found


def test_the_best_so_far_never_rises_and_beats_chance() -> None:
    ours, theirs = [], []
    for seed in range(12):
        evolution = evolved(seed)
        assert all(a >= b for a, b in zip(evolution.curve, evolution.curve[1:], strict=False))
        assert evolution.found[evolution.best] == evolution.curve[-1]
        chance = Evolution(worth, 1000, 0, torch.Generator().manual_seed(100 + seed))
        chance.look([UNIFORM, *(chance.random(4) for _ in range(len(evolution.found) - 1))])
        ours.append(evolution.curve[-1])
        theirs.append(chance.curve[-1])
    assert sum(ours) < 0.9 * sum(theirs)


def test_a_mutant_differs_and_a_crossing_takes_from_both() -> None:
    evolution = Evolution(worth, 1000, 0, torch.Generator().manual_seed(0))
    for _ in range(50):
        mutant = evolution.mutant(UNIFORM)
        assert mutant is None or (mutant != UNIFORM and len(mutant) == 4)
        crossed = evolution.crossing(UNIFORM, TARGET)
        assert crossed is None or set(crossed) <= set(UNIFORM) | set(TARGET)


# ---------------------------------------------------------------------------------- on a pipeline
def colours(pictures: Tensor) -> Tensor:
    """Mean colours of four quarters, as features."""
    return F.adaptive_avg_pool2d(pictures.double(), 2).flatten(1)


def preparation(pipe: Any, **arguments: Any) -> Preparation:
    """A target that the uniform list misses: pictures that are drawn in other steps."""
    return Preparation(
        open_subject(pipe),
        [],
        prompts=["a red circle", "zzz", "blue", "green square"],
        arguments={"height": 16, "width": 16, "features": colours, "real": REAL, **arguments},
    )


SMALL: dict[str, Any] = {"population": 4, "generations": 2, "samples": 4, "batch": 3, "steps": 3}
REAL = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_same_list_is_worth_the_same_and_the_uniform_one_is_the_librarys() -> None:
    pipe = tiny("unet")
    judge = Fitness.of(AutoDiffusion(**SMALL), preparation(pipe))
    uniform = judge.uniform()
    assert judge(uniform) == judge(uniform)
    assert torch.equal(judge.draw(uniform), judge.draw(None))
    alone = pipe(
        **{**judge.arguments[0], "num_inference_steps": 3},
        generator=[torch.Generator().manual_seed(i) for i in range(3)],
    )
    assert torch.equal(judge.draw(uniform)[:3], picture(alone))


@pytest.mark.parametrize("search", ["evolution", "random"])
def test_prepare_finds_a_list_and_the_pipeline_walks_it(search: str, tmp_path: Path) -> None:
    pipe = tiny("unet")
    technique = AutoDiffusion(search=search, **SMALL)
    parts = technique.prepare(preparation(pipe))
    curve, uniform = parts["curve"], float(parts["uniform"])
    assert len(curve) == 3 and bool((curve.diff() <= 0).all()) and float(curve[-1]) <= uniform
    assert torch.equal(parts["timesteps"], technique.prepare(preparation(pipe))["timesteps"])
    with hasten.apply(pipe, technique, parts={"auto_diffusion": parts}) as fast:
        made = picture(fast(**call("unet", num_inference_steps=50)))
        assert fast.activity["calls"] == 3
        hasten.save(fast, tmp_path)
    expected, _ = walked(pipe, parts["timesteps"].tolist(), "unet", num_inference_steps=3)
    assert torch.equal(made, expected)
    with hasten.load(tmp_path, pipe) as fast:
        assert torch.equal(picture(fast(**call("unet"))), expected)


def test_a_list_that_is_not_uniform_is_found_where_another_is_better() -> None:
    """The reference is drawn in uneven steps, so that the uniform list is clearly not the best."""
    pipe = tiny("unet")
    technique = AutoDiffusion(**{**SMALL, "population": 8, "generations": 2})
    judge = Fitness.of(technique, preparation(pipe))
    real = judge.draw((420.0, 60.0, 20.0))
    parts = technique.prepare(preparation(pipe, real=real))
    assert float(parts["curve"][-1]) < 0.8 * float(parts["uniform"])
    assert parts["timesteps"].tolist() != list(judge.uniform())


@pytest.mark.parametrize("family", ["cogview4", "dit"])
def test_flows_and_classes_are_searched_too(family: str) -> None:
    pipe = tiny(family)
    given = preparation(pipe, negative_prompt="x", max_sequence_length=16)
    if family == "dit":
        given.prompts = [3, 9]
        given.arguments = {"features": colours}  # compared with its own pictures
    parts = AutoDiffusion(**SMALL).prepare(given)
    assert len(parts["timesteps"]) == 3 and bool((parts["timesteps"].diff() < 0).all())


def test_the_distance_is_frechets() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40_000, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5])
    second = torch.randn(40_000, 3, generator=generator) * torch.tensor([2.0, 1.0, 0.5]) + 1.0
    assert frechet(first, first) == pytest.approx(0.0, abs=1e-6)
    # Between Gaussians along the axes: squared distance of means and of deviations.
    assert frechet(first, second) == pytest.approx(3.0 + 2.0, rel=0.05)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PlanError, match="no trained part"):
        hasten.apply(tiny("unet"), "auto_diffusion")
    with pytest.raises(SubjectError, match="other timesteps"):
        hasten.apply(
            tiny("unet", scheduler="HeunDiscreteScheduler"),
            "auto_diffusion",
            parts={"auto_diffusion": {"timesteps": torch.tensor([9.0, 1.0])}},
        )
    found = {"auto_diffusion": {"timesteps": torch.tensor([900.0, 100.0])}}
    with (
        hasten.apply(tiny("sd3"), "auto_diffusion(steps=2)", parts=found) as fast,
        pytest.raises(HastenError, match="its own sigmas"),
    ):
        fast(**call("sd3", sigmas=[1.0, 0.5]))
    for other in ("fewer_steps", "bottleneck_sampling", "just_in_time", "rollover_budget_forcing"):
        with pytest.raises(PlanError):
            hasten.plan.Plan.parse(f"auto_diffusion, {other}")
