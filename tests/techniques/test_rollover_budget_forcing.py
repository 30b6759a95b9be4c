"""Rollover budget forcing: the stochastic path beside exact solutions, and what the search spends."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.run import Run
from hasten.denoise.state.interpolants import Place, linear, variance_preserving
from hasten.denoise.state.rewards import REWARDS, colourfulness, contrast
from hasten.denoise.state.rollover_budget_forcing import RolloverBudgetForcing
from hasten.errors import HastenError, PlanError, SubjectError
from hasten.zoo.scenes.caption import prompts
from tests import pipelines
from tests.pipelines import picture, tiny
from tests.techniques import drawn

SMALL = "budget=40, chains=2, draws=4, steps=4, walk=3"


def call(family: str, **more: Any) -> dict[str, Any]:
    return pipelines.call(family, **more)


def searched(pipe: Any, plan: str, family: str, **more: Any) -> tuple[Tensor, Run, Any]:
    with hasten.apply(pipe, plan) as fast:
        run = fast.start()
        made = picture(fast._execute(run, **call(family, **more)))
    return made, run, fast


# --------------------------------------------------------------------------------------- the paths
@pytest.mark.parametrize("path", [linear, variance_preserving])
@pytest.mark.parametrize("s", [0.05, 0.3, 0.7, 0.99])
def test_derivatives_are_those_of_the_path(path: Callable[[float], Place], s: float) -> None:
    here, step = path(s), 1e-5
    after, before = path(s + step), path(s - step)
    for name in ("alpha", "sigma", "t", "c"):
        slope = (getattr(after, name) - getattr(before, name)) / (2 * step)
        assert getattr(here, f"d_{name}") == pytest.approx(slope, abs=1e-4, rel=1e-4)
    # The same ratio of signal to noise, and the scale between both.
    assert here.alpha / here.sigma == pytest.approx((1 - here.t) / here.t, rel=1e-6)
    assert here.c * here.t == pytest.approx(here.sigma)


def test_the_other_path_begins_where_the_flow_does() -> None:
    """Nearly: its noise at the start is of the flow's size, so that starts can be shared."""
    here = variance_preserving(1.0)
    assert here.c == pytest.approx(1.0, abs=0.01) and here.t == pytest.approx(1.0, abs=0.01)
    assert linear(1.0).c == linear(1.0).t == 1.0


@pytest.mark.parametrize("path", [linear, variance_preserving])
def test_velocity_score_and_clean_estimate_agree(path: Callable[[float], Place]) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(2))
    for s in (0.2, 0.6, 0.95):
        here = path(s)
        x = here.alpha * clean + here.sigma * noise
        velocity = here.velocity(x, noise - clean)  # the flow's velocity of this very pair
        torch.testing.assert_close(velocity, here.d_alpha * clean + here.d_sigma * noise)
        torch.testing.assert_close(here.clean(x, velocity), clean)
        torch.testing.assert_close(x / here.c - here.t * (noise - clean), clean)
        torch.testing.assert_close(here.score(x, velocity), -noise / here.sigma)


def walk(
    path: Callable[[float], Place], diffusion: float, *, steps: int = 400, end: float = 0.02
) -> tuple[float, float]:
    """Mean and deviation at the end for Gaussian data, whose velocity is known exactly."""
    mean, deviation, count = 0.7, 0.5, 60_000
    generator = torch.Generator().manual_seed(0)
    times = [1.0 - (1.0 - end) * i / steps for i in range(steps + 1)]
    first = path(1.0)
    x = (
        first.alpha * mean
        + torch.randn(count, generator=generator, dtype=torch.float64)
        * ((first.alpha * deviation) ** 2 + first.sigma**2) ** 0.5
    )
    for s, after in itertools.pairwise(times):
        here = path(s)
        z, a, b = x / here.c, 1 - here.t, here.t
        variance = (a * deviation) ** 2 + b**2
        noise = b / variance * (z - a * mean)  # expected, given z
        clean = mean + a * deviation**2 / variance * (z - a * mean)
        drawn = torch.randn(count, generator=generator, dtype=torch.float64)
        x = here.step(x, noise - clean, s - after, diffusion * s**2, drawn)
    last = path(end)
    expected = math.hypot(last.alpha * deviation, last.sigma)
    return float(x.mean()) - last.alpha * mean, float(x.std()) / expected


@pytest.mark.parametrize("path", [linear, variance_preserving])
@pytest.mark.parametrize("diffusion", [0.0, 1.0, 3.0])
def test_any_strength_of_noise_keeps_the_margins(
    path: Callable[[float], Place], diffusion: float
) -> None:
    shift, ratio = walk(path, diffusion)
    assert abs(shift) < 0.02 and abs(ratio - 1.0) < 0.03


def test_the_converted_ode_ends_where_the_flow_does() -> None:
    pipe = tiny("sd3")
    plain = picture(pipe(**call("sd3", num_inference_steps=320, guidance_scale=1.0)))
    plan = (
        "rollover_budget_forcing(path=vp, diffusion=0.0, chains=1, draws=1, steps={0}, budget={1}, "
        "walk=0, grid=even)"
    )
    far = []
    for steps in (20, 320):
        made, _, fast = searched(pipe, plan.format(steps, 1 + steps), "sd3", guidance_scale=1.0)
        assert fast.activity["calls"] == 1 + steps
        far.append(float((made - plain).abs().mean()))
    assert far[1] < 0.01 and far[1] < 0.3 * far[0]


@pytest.mark.parametrize("family", ["sd3", "flux", "cogview4", "sana"])
def test_without_noise_and_conversion_it_is_the_pipelines_own_sampler(family: str) -> None:
    plain = picture(tiny(family)(**call(family)))
    made, _, fast = searched(
        tiny(family), "rollover_budget_forcing(path=linear, diffusion=0.0)", family
    )
    assert torch.equal(made, plain)
    assert not any(key.startswith("rollover") for key in fast.activity)


# --------------------------------------------------------------------------------------- the search
@pytest.mark.parametrize("family", ["sd3", "flux", "cogview4", "sana", "z_image", "lumina2"])
def test_it_spends_the_budget_and_not_one_more(family: str) -> None:
    made, run, fast = searched(tiny(family), f"rollover_budget_forcing({SMALL})", family)
    assert bool(made.isfinite().all())
    assert fast.activity["steps"] == 40
    assert fast.activity["rollover_budget_forcing.evaluations"] == 40
    state = run.state(run.slots.state)
    assert state.searches[0].shares == [19, 18]
    assert sum(spent for _, spent in state.searches[0].ledger) == 40 - 3 - 2 * 4


def ledger(reward: Any, plan: str = SMALL) -> list[tuple[int, int]]:
    _, run, _ = searched(tiny("sd3"), f"rollover_budget_forcing({plan})", "sd3", reward=reward)
    return list(run.state(run.slots.state).searches[0].ledger)


def test_a_reward_that_always_rises_takes_one_evaluation_a_step() -> None:
    count = 0

    def rising(pictures: Tensor, prompts: Any) -> list[float]:
        nonlocal count
        count += 1
        return [float(count)]

    plan = "budget=40, chains=1, draws=4, steps=4, walk=0"
    quota = (40 - 4) // 4
    found = ledger(rising, plan)
    assert found == [(quota, 1), (2 * quota - 1, 1), (3 * quota - 2, 40 - 4 - 2)]


def test_a_constant_reward_is_a_search_of_fixed_quotas() -> None:
    def flat(pictures: Tensor, prompts: Any) -> Tensor:
        return torch.ones(len(pictures))

    plan = "budget=40, chains=1, draws=4, steps=4, walk=0"
    quota = (40 - 4) // 4
    assert ledger(flat, plan) == [(quota, quota), (quota, quota), (quota, 40 - 4 - 2 * quota)]
    first, _, _ = searched(tiny("sd3"), f"rollover_budget_forcing({SMALL})", "sd3", reward=flat)
    second, _, _ = searched(
        tiny("sd3"), f"rollover_budget_forcing({SMALL}, rollover=false)", "sd3", reward=flat
    )
    assert torch.equal(first, second)


def test_quotas_and_what_is_left_of_them_add_up() -> None:
    chance = torch.Generator().manual_seed(0)

    def random(pictures: Tensor, prompts: Any) -> Tensor:
        return torch.rand(len(pictures), generator=chance)

    plan = "budget=90, chains=1, draws=5, steps=8, walk=0"
    found, quota = ledger(random, plan), (90 - 5) // 8
    assert sum(spent for _, spent in found) == 85
    for (room, spent), (following, _) in itertools.pairwise(found):
        assert spent <= room
        assert following in (quota, quota + room - spent)
    assert any(room > quota for room, _ in found)


def test_the_best_of_the_last_step_is_what_comes_out() -> None:
    """By a reward that likes dark pictures: what comes out is the darkest that was seen there."""
    seen: list[Tensor] = []

    def dark(pictures: Tensor, prompts: Any) -> Tensor:
        seen.append(pictures.clone())
        return -pictures.mean(dim=(1, 2, 3))

    plan = "budget=30, chains=1, draws=3, steps=3, walk=0"
    made, run, _ = searched(tiny("sd3"), f"rollover_budget_forcing({plan})", "sd3", reward=dark)
    last = run.state(run.slots.state).searches[0].ledger[-1][1]
    means = [float(p.mean()) for p in seen[-last:]]
    torch.testing.assert_close(
        made, seen[-last:][means.index(min(means))].to(made.dtype), atol=2e-3, rtol=0
    )
    start = [float(p.mean()) for p in seen[:3]]
    assert min(means) < min(start)


def test_samples_of_a_batch_are_searched_by_themselves() -> None:
    def bright(pictures: Tensor, prompts: Any) -> Tensor:
        assert len(prompts) == len(pictures)
        return pictures.mean(dim=(1, 2, 3))

    prompts = {"prompt": ["a red circle", "zzz"], "negative_prompt": ["x", "y"]}
    plan = f"rollover_budget_forcing({SMALL})"
    both, _, _ = searched(
        tiny("sd3"),
        plan,
        "sd3",
        generator=[torch.Generator().manual_seed(i) for i in (1, 2)],
        reward=bright,
        **prompts,
    )
    alone, _, _ = searched(
        tiny("sd3"),
        plan,
        "sd3",
        generator=[torch.Generator().manual_seed(2)],
        prompt="zzz",
        negative_prompt="y",
        reward=bright,
    )
    torch.testing.assert_close(both[1:], alone, atol=1e-3, rtol=0)
    assert not torch.allclose(both[:1], both[1:], atol=1e-2)


def test_more_evaluations_find_more_and_noise_is_needed_to_find_anything() -> None:
    def best(budget: int, **knobs: Any) -> float:
        found = []

        def noted(pictures: Tensor, prompts: Any) -> Tensor:
            values = colourfulness(pictures, prompts)
            found.append(values)
            return values

        text = ", ".join(f"{key}={value}" for key, value in knobs.items())
        made, _, _ = searched(
            tiny("sd3"),
            f"rollover_budget_forcing(budget={budget}, chains=1, draws=4, steps=4, walk=0, {text})",
            "sd3",
            reward=noted,
            num_images_per_prompt=4,
        )
        return float(colourfulness(made, []).mean())

    little, much = best(10), best(40)
    assert much > little
    assert best(40, diffusion=0.0) < much


def test_bfloat16_and_second_calls() -> None:
    with hasten.apply(tiny("sd3"), f"rollover_budget_forcing({SMALL})") as fast:
        first, second = (picture(fast(**call("sd3"))) for _ in range(2))
        assert torch.equal(first, second)
        pipe = fast.pipe
    plain = picture(tiny("sd3")(**call("sd3")))
    assert torch.equal(picture(pipe(**call("sd3"))), plain)
    made, _, _ = searched(
        tiny("sd3", dtype=torch.bfloat16), f"rollover_budget_forcing({SMALL})", "sd3"
    )
    assert bool(made.isfinite().all())


def test_rewards_by_name() -> None:
    grey = torch.full((2, 3, 8, 8), 0.5)
    grey[1, 0, :4] = 1.0
    for reward in (colourfulness, contrast):
        values = reward(grey, ["", ""])
        assert float(values[0]) == pytest.approx(0.0, abs=1e-6) and float(values[1]) > 0.05


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SubjectError, match="flows"):
        hasten.apply(tiny("unet"), "rollover_budget_forcing")
    with pytest.raises(SubjectError, match="text-to-image"):
        hasten.apply(tiny("sd3", kind="StableDiffusion3Img2ImgPipeline"), "rollover_budget_forcing")
    with pytest.raises(SubjectError, match="clips"):
        hasten.apply(tiny("wan"), "rollover_budget_forcing")
    with (
        hasten.apply(tiny("sd3"), "rollover_budget_forcing(budget=60)") as fast,
        pytest.raises(HastenError, match="which need 78"),
    ):
        fast(**call("sd3"))
        with pytest.raises(HastenError, match="must be a function"):
            fast(**call("sd3", reward="good"))
    with (
        hasten.apply(tiny("sd3"), f"rollover_budget_forcing({SMALL})") as fast,
        pytest.raises(HastenError, match="one for each"),
    ):
        fast(**call("sd3", reward=lambda pictures, prompts: [1.0, 2.0]))
        with pytest.raises(PlanError, match="sigmas"):
            fast(**call("sd3", sigmas=[1.0, 0.5]))
    for other in ("zeus", "easy_cache", "stream_diffusion", "fewer_steps", "adaptive_guidance"):
        with pytest.raises(PlanError, match="rollover_budget_forcing"):
            hasten.plan.Plan.parse(f"rollover_budget_forcing, {other}")


def test_it_has_its_papers_defaults() -> None:
    technique = RolloverBudgetForcing()
    assert (technique.budget, technique.chains, technique.draws, technique.steps) == (
        500,
        2,
        25,
        10,
    )
    assert technique.diffusion == 3.0
    _, quota = RolloverBudgetForcing(walk=0)._shares()
    assert quota == 22


# --------------------------------------------------------------------------------- trained models
@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_the_search_finds_what_the_prompt_asks_for() -> None:
    """The reward counts words of the caption; the judge is the share of attributes."""
    name = "scenes-dit"
    drawn.model(name)
    one = drawn.draw(name, "", 16, num_inference_steps=20)
    plan = (
        "rollover_budget_forcing(budget=80, chains=1, draws=12, steps=6, walk=12, reward=caption)"
    )
    found = drawn.draw(name, plan, 16)
    assert found.attributes() > one.attributes()
    pictures = found.pictures.flatten(1)
    assert float(torch.pdist(pictures).min()) > 1.0  # no two are the same


@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_more_evaluations_and_handing_them_on_raise_the_reward() -> None:
    """What is left of a quota is worth no less where it is handed on than in a fixed number a step."""
    name, count = "scenes-dit", 16
    drawn.model(name)
    knobs = "chains=1, draws=8, steps=6, walk=0, reward=caption"
    best: dict[str, Tensor] = {}
    for word, more in {
        "little": "budget=24",
        "much": "budget=96",
        "fixed": "budget=96, rollover=false",
    }.items():
        found = drawn.draw(name, f"rollover_budget_forcing({knobs}, {more})", count)
        captions = [words for words, _ in prompts(count, drawn.SEED)]
        best[word] = torch.as_tensor(REWARDS["caption"](found.pictures, captions)).double()
    for better, worse, least in (("much", "little", 2), ("much", "fixed", -2)):
        gain = best[better] - best[worse]
        assert gain.mean() > least * gain.std() / count**0.5, (better, worse, gain)
