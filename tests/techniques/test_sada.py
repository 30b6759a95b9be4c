"""SADA: its criterion, its estimates and its tokens beside plain versions of the sheet."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.blocks import BlockCall
from hasten.denoise.gate.sada import AHEAD
from hasten.denoise.gate.token_choice import TokenCache, _one_of_each_cell, shorten
from hasten.denoise.run import Run
from hasten.errors import PlanError, SubjectError
from hasten.plan import Plan
from tests import pipelines
from tests.techniques.trajectories import ddim, dpm, flow, gaussian, mixture, psnr, record, toy


def test_the_weights_of_the_foretold_state_sum_to_one() -> None:
    assert sum(AHEAD) == 1.0


def lagrange(nodes: list[tuple[int, Tensor]], place: int) -> Tensor:
    total = torch.zeros_like(nodes[0][1])
    for here, value in nodes:
        weight = 1.0
        for other, _ in nodes:
            if other != here:
                weight *= (place - other) / (here - other)
        total += weight * value
    return total


def noise_reference(
    rule: Any,
    scheduler: Any,
    x: Tensor,
    most: int,
    late: int,
    whole: bool,
    velocity: bool = False,
) -> Any:
    """Steps 1 to 6 of the sheet for a noise model: the last sample, and which steps ran.

    The sheet's slopes are for one training timestep; `whole` follows them for the sampler's step.
    With `velocity` the rule gives v, which is kept at skipped steps in the place of the noise.
    """
    scheduler.set_timesteps(50)
    times, shares = scheduler.timesteps, scheduler.alphas_cumprod
    slopes: list[Tensor] = []
    nodes: list[tuple[int, Tensor]] = []
    skip, in_late, skips, ran = False, False, 0, []
    eps, x_hat = x, x
    for i, t in enumerate(times):
        share = float(shares[int(t)])
        a, s = share**0.5, (1 - share) ** 0.5
        if not skip:
            eps = rule(x, float(t))
        if skip and in_late:
            clean = lagrange(nodes, i)
        else:
            state = x_hat if skip else x
            clean = a * state - s * eps if velocity else (state - s * eps) / a
        ran.append(not skip)
        if i % 4 == 1:
            nodes = [*nodes, (i, clean)][-4:]
        b, n = float(scheduler.betas[int(t)]), 50
        f = 0.5 * b * n / s * a * eps if velocity else -0.5 * b * n * x + 0.5 * b * n / s * eps
        slopes = [*slopes, f][-3:]
        given = (a * x - clean) / s if velocity else (x - a * clean) / s
        x_next = scheduler.step(given, t, x, return_dict=False)[0]
        skip = False
        if 10 <= i < 47:
            f0, f1, f2 = reversed(slopes)
            reach = float(t - times[i + 1]) if whole else 1.0
            x_hat = x - reach * (0.625 * f0 + 0.75 * f1 - 0.375 * f2) / n
            m = (x_next - x_hat) * (f0 - 2 * f1 + f2)
            in_late = i >= late
            skip = i % 4 != 0 if in_late else float(m.mean()) <= 0
            skip = skip and skips < most
        skips = skips + 1 if skip else 0
        x = x_next
    return x, ran


@pytest.mark.parametrize("make", [dpm, ddim])
@pytest.mark.parametrize("reach", ["timestep", "step"])
@pytest.mark.parametrize(("most", "late"), [(4, 24), (2, 48)])
def test_every_step_of_a_noise_model_is_the_sheets(
    make: Any, reach: str, most: int, late: int
) -> None:
    for seed in range(2):
        pipe = toy(mixture(kind=ddim()), make())
        plan = f"sada(max_skips={most}, late={late / 50}, reach={reach})"
        noted = record(pipe, plan, seed=seed, num_inference_steps=50)
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        rule, whole = mixture(kind=ddim()), reach == "step"
        expected, ran = noise_reference(rule, make(), start, most, late, whole)
        assert noted.ran == ran
        assert torch.allclose(noted.sample, expected, atol=2e-3)
        assert noted.longest <= most and noted.calls < 50


def test_every_step_of_a_model_of_v_is_the_sheets() -> None:
    noise, table = mixture(kind=ddim()), ddim().alphas_cumprod

    def said(x: Tensor, t: float) -> Tensor:
        a, s = float(table[int(t)]) ** 0.5, (1 - float(table[int(t)])) ** 0.5
        eps = noise(x, t)
        return a * eps - s * (x - s * eps) / a

    for seed in range(2):
        scheduler = dpm(prediction_type="v_prediction")
        noted = record(toy(said, scheduler), "sada", seed=seed, num_inference_steps=50)
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        other = dpm(prediction_type="v_prediction")
        expected, ran = noise_reference(said, other, start, 4, 24, True, velocity=True)
        assert noted.ran == ran and noted.calls < 40
        assert torch.allclose(noted.sample, expected, atol=2e-3)


def flow_reference(rule: Any, scheduler: Any, x: Tensor, most: int, late: int) -> Any:
    """The same for a flow model; history holds what the calls made, skipped ones the last again."""
    scheduler.set_timesteps(50)
    history: list[Tensor] = []
    skip, skips, ran = False, 0, []
    for i, t in enumerate(scheduler.timesteps):
        made = history[-1] if skip else rule(x, float(t))
        history = [*history, made][-3:]
        used = 2 * history[-2] - history[-3] if skip else made
        ran.append(not skip)
        x = scheduler.step(used, t, x, return_dict=False)[0]
        straight = skip
        skip = False
        if 10 <= i < 47:
            m = -(history[-1] - history[-2]) + (history[-2] - history[-3])
            stable = straight or float(m.mean()) <= 0
            skip = (i % 4 != 0 if i >= late else stable) and skips < most
        skips = skips + 1 if skip else 0
    return x, ran


@pytest.mark.parametrize(("most", "late"), [(4, 24), (4, 48), (1, 48)])
def test_every_step_of_a_flow_model_is_the_sheets(most: int, late: int) -> None:
    for seed in range(3):
        plan = f"sada(max_skips={most}, late={late / 50})"
        noted = record(toy(mixture(), flow()), plan, seed=seed, num_inference_steps=50)
        start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        expected, ran = flow_reference(mixture(), flow(), start, most, late)
        assert noted.ran == ran and torch.allclose(noted.sample, expected, atol=1e-5)
        assert noted.longest <= most
        assert noted.run.activity["sada.predicted"] == noted.run.activity["skipped"]


def test_a_velocity_that_is_linear_in_time_is_followed_exactly() -> None:
    """Single skips between neighbours that ran; the gap of longer runs is the released code's."""
    generator = torch.Generator().manual_seed(1)
    rise = torch.randn(1, 4, 8, 8, generator=generator)
    pipe = toy(lambda x, t: 0.3 + t / 1000 * rise, flow())
    noted = record(pipe, "sada(max_skips=1, late=1)", num_inference_steps=50)
    first = next(step for step in noted.steps if not step.ran)
    assert torch.allclose(first.output, 0.3 + float(first.timestep) / 1000 * rise, atol=1e-5)


def cubic(steps: int = 50) -> Any:
    """The noise that speaks of a clean sample that is a cubic of the step."""
    scheduler = ddim()
    scheduler.set_timesteps(steps)
    places = {float(t): i for i, t in enumerate(scheduler.timesteps)}

    def rule(sample: Tensor, t: float) -> Tensor:
        share = float(scheduler.alphas_cumprod[int(t)])
        place = places[t] / 50
        clean = 0.5 + place - 2 * place**2 + 1.5 * place**3
        return (sample - share**0.5 * clean) / (1 - share) ** 0.5

    return rule


def test_late_steps_reproduce_a_cubic() -> None:
    pipe = toy(cubic(), dpm())
    full = record(pipe, num_inference_steps=50)
    noted = record(pipe, "sada(start=0.48)", num_inference_steps=50)
    assert noted.run.activity["sada.interpolated"] == noted.run.activity["skipped"] > 10
    assert torch.allclose(noted.sample, full.sample, atol=2e-4)


@pytest.mark.parametrize("family", ["dit", "cogview4"])
@pytest.mark.parametrize("knobs", ["end=0.0"])
def test_neutral_is_the_pipeline_itself(family: str, knobs: str) -> None:
    pipe = pipelines.tiny(family)
    expected = pipelines.picture(pipe(**pipelines.call(family, num_inference_steps=12)))
    with hasten.apply(pipe, f"sada({knobs})") as fast:
        made = fast(**pipelines.call(family, num_inference_steps=12))
        assert "skipped" not in fast.activity
    assert torch.equal(pipelines.picture(made), expected)


def test_few_steps_are_left_alone() -> None:
    assert record(toy(mixture(), flow()), "sada(start=0, end=1)", num_inference_steps=8).calls == 8


def test_which_steps_run_depends_on_the_sample() -> None:
    for pipe in (toy(mixture(), flow()), toy(mixture(kind=ddim()), dpm())):
        patterns = {
            tuple(record(pipe, "sada(late=1)", seed=seed, num_inference_steps=50).ran)
            for seed in range(8)
        }
        assert len(patterns) > 1


def test_the_opposite_criterion_skips_other_steps() -> None:
    pipe = toy(mixture(kind=ddim()), dpm())
    kept = [
        record(pipe, f"sada(criterion={kind}, late=1)", seed=3, num_inference_steps=50).ran
        for kind in ("stable", "unstable", "random")
    ]
    assert kept[0] != kept[1] != kept[2] != kept[0]


def test_the_criterion_beats_chance_at_as_many_calls() -> None:
    """Single skips, so that both skip as much."""
    pipe, quality, calls = toy(mixture(kind=ddim()), dpm()), {}, {}
    full = [record(pipe, num_inference_steps=50, seed=seed).sample for seed in range(12)]
    for kind in ("stable", "random"):
        plan = f"sada(criterion={kind}, late=1, max_skips=1)"
        noted = [record(pipe, plan, seed=seed, num_inference_steps=50) for seed in range(12)]
        quality[kind] = sum(map(psnr, [one.sample for one in noted], full)) / 12
        calls[kind] = sum(one.calls for one in noted) / 12
    assert abs(calls["stable"] - calls["random"]) < 1
    assert quality["stable"] > quality["random"] + 1


@pytest.mark.parametrize("scheduler", [flow, ddim])
def test_it_begins_anew_where_the_size_changes(scheduler: Any) -> None:
    kind = "flow" if scheduler is flow else ddim()
    rule = (lambda x, t: 0.3 * x) if kind == "flow" else gaussian(kind)
    noted = record(toy(rule, scheduler()), "sada", num_inference_steps=50, grow_at=20)
    assert noted.sample.shape[-1] == 16 and bool(noted.sample.isfinite().all())
    assert all(noted.ran[20:23]) and not all(noted.ran)  # three slopes of the new size


def test_the_foretold_state_makes_a_better_clean_sample_than_the_solvers() -> None:
    """With fewer calls or as many; and the code's reach of one training timestep does not pay."""
    pipe = toy(mixture(kind=ddim()), ddim())
    quality, calls = {}, {}
    for knobs in ("rebuild=ahead", "rebuild=current", "reach=timestep"):
        noted = [
            record(pipe, f"sada({knobs})", seed=seed, num_inference_steps=50) for seed in range(4)
        ]
        full = [record(pipe, num_inference_steps=50, seed=seed).sample for seed in range(4)]
        calls[knobs] = sum(one.calls for one in noted)
        quality[knobs] = sum(map(psnr, [one.sample for one in noted], full)) / 4
    for other in ("rebuild=current", "reach=timestep"):
        assert quality["rebuild=ahead"] > quality[other] + 1
        assert calls["rebuild=ahead"] <= calls[other]


def test_euler_runs_in_its_own_parametrisation() -> None:
    """Its samples are scaled: the same model by DDIM and by Euler skips the very same steps."""
    rule = mixture(kind=ddim())
    for seed in range(4):
        euler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
        ours, theirs = (
            record(toy(rule, scheduler), "sada", seed=seed, num_inference_steps=50)
            for scheduler in (euler, ddim())
        )
        assert ours.ran == theirs.ran and ours.calls < 30
        assert torch.allclose(ours.sample, theirs.sample, atol=1e-3)
    pipe = pipelines.tiny("sdxl")
    call = {"num_inference_steps": 14}
    with hasten.apply(pipe, "sada") as fast:
        made = pipelines.picture(fast(**pipelines.call("sdxl", **call)))
        assert fast.activity["skipped"] > 2 and bool(made.isfinite().all())
    plain = pipelines.picture(pipe(**pipelines.call("sdxl", **call)))
    assert psnr(made, plain) > 25


@pytest.mark.parametrize(
    "scheduler",
    [
        "DDPMScheduler",
        "EulerAncestralDiscreteScheduler",
        "LCMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "KDPM2AncestralDiscreteScheduler",
    ],
)
def test_samplers_that_add_noise_are_refused(scheduler: str) -> None:
    with pytest.raises(SubjectError, match="adds noise"):
        hasten.apply(pipelines.tiny("unet", scheduler=scheduler), "sada")


@pytest.mark.parametrize(
    "scheduler",
    [flow(stochastic_sampling=True), dpm(algorithm_type="sde-dpmsolver++")],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_settings_that_add_noise_are_refused(scheduler: Any) -> None:
    with pytest.raises(SubjectError, match="adds noise"):
        hasten.apply(toy(lambda x, t: x, scheduler), "sada")


# ----------------------------------------------------------------------------------------- tokens
TOKEN_FAMILIES = ["dit", "sd3", "flux", "pixart", "cogview4", "wan", "cogvideox", "ltx"]


class Permuting:
    """In the place of the token part: blocks run on all tokens, in another order."""

    def __init__(self) -> None:
        self.seen = 0

    def block(self, state: Any, run: Any, call: BlockCall) -> Any:
        hidden = call.hidden
        order = torch.randperm(hidden.shape[1], generator=torch.Generator().manual_seed(call.index))
        self.seen += 1
        shorten(call, order)
        made, text = call.parts(call.compute())
        return call.output(torch.empty_like(made).index_copy(1, order, made), text)


@pytest.mark.parametrize("family", TOKEN_FAMILIES)
def test_tokens_take_their_positions_with_them(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens in any order, each with its own position, make what they make in order."""
    from hasten.denoise.gate.sada import Sada

    pipe = pipelines.tiny(family)
    expected = pipelines.picture(pipe(**pipelines.call(family)))
    permuting = Permuting()
    monkeypatch.setattr(
        Sada, "block", lambda self, state, run, call: permuting.block(state, run, call)
    )
    with hasten.apply(pipe, "sada(tokens=0.5)") as fast:
        made = pipelines.picture(fast(**pipelines.call(family)))
    assert permuting.seen > 0
    assert torch.allclose(made, expected, atol=1e-4)


@pytest.mark.parametrize("family", ["dit", "wan", "auraflow"])
def test_all_tokens_kept_is_the_block_itself(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering and scattering is the identity, bit for bit."""

    def choose(self: TokenCache, score: Tensor, luck: torch.Generator) -> None:
        self.score = torch.ones_like(score.mean(dim=0, keepdim=True))

    monkeypatch.setattr(TokenCache, "choose", choose)
    call = pipelines.call(family, num_inference_steps=20)
    pipe = pipelines.tiny(family)
    with hasten.apply(pipe, "sada(max_skips=1, late=1, criterion=unstable)") as fast:
        expected = pipelines.picture(fast(**call))
    call = pipelines.call(family, num_inference_steps=20)
    plan = "sada(max_skips=1, late=1, criterion=unstable, tokens=1.0)"
    with hasten.apply(pipe, plan) as fast:
        made = pipelines.picture(fast(**call))
    assert torch.equal(made, expected)


@pytest.mark.parametrize("grid", [(1, 9, 9), (1, 8, 8), (2, 4, 7), (1, 1, 1)])
def test_chance_keeps_one_token_of_each_cell_of_three_by_three(grid: tuple[int, int, int]) -> None:
    frames, height, width = grid
    drawn = [
        _one_of_each_cell(grid, frames * height * width, torch.Generator().manual_seed(seed))
        for seed in range(2)
    ]
    for chosen in drawn:
        kept = chosen.reshape(grid).nonzero()
        cells = {(int(f), int(y) // 3, int(x) // 3) for f, y, x in kept}
        assert len(cells) == len(kept) == frames * -(-height // 3) * -(-width // 3)
    assert torch.equal(*drawn) == (grid == (1, 1, 1))  # other ones each time


def test_tokens_with_the_highest_score_are_computed_and_none_below_zero() -> None:
    pipe = pipelines.tiny("dit")
    seen: list[tuple[Tensor, Tensor]] = []
    kept_of = TokenCache._kept

    def noted(self: TokenCache, run: Run, tokens: int) -> Tensor | None:
        kept = kept_of(self, run, tokens)
        assert self.score is not None and kept is not None
        seen.append((self.score.mean(dim=1)[0], kept))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenCache, "_kept", noted)
        with hasten.apply(pipe, "sada(max_skips=3, late=1, criterion=random, tokens=0.3)") as fast:
            fast(**pipelines.call("dit", num_inference_steps=30))
    assert len(seen) > 3
    for score, kept in seen:  # patches of two by two
        tokens = torch.nn.functional.avg_pool2d(score[None], 2).flatten()
        order = tokens.argsort(descending=True)[: round(0.3 * len(tokens))]
        asked = {int(i) for i in order if tokens[i] >= 0}
        assert asked <= set(kept.tolist())
        assert len(kept) <= len(asked) + 4  # and one of each of four cells


def test_blocks_are_made_anew_after_so_many_steps() -> None:
    """Counted from the start of the range, or from the last skip."""
    cache = TokenCache("x", 4, 0.3)
    cache.score = torch.ones(1, 4, 8, 8)
    whole = []
    for index in range(10, 24):
        if index == 17:
            cache.skipped(index)
            cache.score = torch.ones(1, 4, 8, 8)
            continue
        run: Any = type("FakeRun", (), {"index": index})()
        cache.begin_step(run, range(10, 22))
        assert cache.records == (index < 22)
        if cache.records and not cache.prunes:
            whole.append(index)
    assert whole == [10, 14, 18]
    cache.begin_step(type("FakeRun", (), {"index": 19})(), range(10, 22))  # type: ignore[arg-type]
    assert cache.prunes
    cache.score = None  # no step was judged yet: nothing says which tokens
    cache.begin_step(type("FakeRun", (), {"index": 19})(), range(10, 22))  # type: ignore[arg-type]
    assert not cache.prunes


@pytest.mark.parametrize("family", ["dit", "auraflow", "cogview4"])
def test_some_tokens_keep_what_blocks_made_of_them(family: str) -> None:
    pipe = pipelines.tiny(family)
    plan = "sada(max_skips=3, late=1, criterion=random, tokens=0.3)"
    with hasten.apply(pipe, plan) as fast:
        made = pipelines.picture(fast(**pipelines.call(family, num_inference_steps=30)))
        counted = fast.activity
        assert counted["sada.tokens_left_out"] > 0 and counted["sada.tokens_kept"] > 0
    share = counted["sada.tokens_kept"] / (
        counted["sada.tokens_kept"] + counted["sada.tokens_left_out"]
    )
    assert share < 0.6 and bool(made.isfinite().all())


def test_the_token_part_takes_the_block_slot() -> None:
    Plan.parse("sada, random_block_reuse")
    with pytest.raises(PlanError, match="block"):
        Plan.parse("sada(tokens=0.5), random_block_reuse")


@pytest.mark.parametrize(("family", "reason"), [("unet", "has none"), ("sana", "grid")])
def test_blocks_that_need_all_tokens_are_named(family: str, reason: str) -> None:
    with pytest.raises(SubjectError, match=reason):
        hasten.apply(pipelines.tiny(family), "sada(tokens=0.5)")


@pytest.mark.parametrize("family", ["flux", "cogview4", "cogvideox"])
def test_it_runs_on_every_kind_and_again(family: str) -> None:
    pipe = pipelines.tiny(family)
    with hasten.apply(pipe, "sada") as fast:
        first = pipelines.picture(fast(**pipelines.call(family, num_inference_steps=20)))
        assert fast.activity["skipped"] > 0
        again = pipelines.picture(fast(**pipelines.call(family, num_inference_steps=20)))
    assert torch.equal(first, again) and bool(first.isfinite().all())
