"""AutoDiffusion: the search beside chance, and a solver whose coefficients follow the gaps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hasten
from hasten.denoise.blocks import layers as layers_of
from hasten.denoise.network import networks
from hasten.denoise.run import Run, Slots
from hasten.denoise.schedule.auto_diffusion import AutoDiffusion
from hasten.denoise.schedule.evolution import Evolution, Gene, Genome, count_left_out, full
from hasten.denoise.schedule.fitness import SHRINK, Fitness
from hasten.denoise.schedule.grid import set_grid, sigma_of, time_of, times
from hasten.denoise.slots import Schedule
from hasten.errors import HastenError, PlanError, SubjectError
from hasten.preparation import Preparation
from hasten.subject import open_subject
from hasten.technique import Card, Contract, Loss, Parts
from hasten.zoo.scenes.caption import prompts
from hasten.zoo.scenes.judge import frechet
from hasten.zoo.scenes.render import render
from tests import pipelines
from tests.pipelines import picture, tiny
from tests.techniques import drawn
from tests.techniques.denoising import made, recording
from tests.techniques.trajectories import dpm, toy

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
TARGET = full([930.0, 700.0, 240.0, 60.0])
UNIFORM = full([999.0, 749.0, 499.0, 249.0])


def worth(genome: Genome) -> float:
    return sum(abs(a.time - b.time) / 100 for a, b in zip(genome, TARGET, strict=True))


def evolved(seed: int, *, generations: int = 8, population: int = 20) -> Evolution:
    evolution = Evolution(worth, 1000, 0, torch.Generator().manual_seed(seed))
    evolution.look(evolution.first(UNIFORM, population))
    for _ in range(generations):
        evolution.look(evolution.next(population, evolution.ranked(population // 5)))
    return evolution


def test_lists_are_distinct_fall_and_are_never_judged_twice() -> None:
    asked: list[Genome] = []
    evolution = evolved(0)
    evolution.fitness = lambda genome: asked.append(genome) or worth(genome)  # type: ignore[func-returns-value]
    evolution.look(evolution.next(20, evolution.ranked(4)))
    assert len(asked) == len(set(asked)) == 20
    for genome in evolution.found:
        listed = [gene.time for gene in genome]
        assert len(set(listed)) == 4 and listed == sorted(listed, reverse=True)
        assert all(0 <= t < 1000 and t == int(t) for t in listed)
        assert count_left_out(genome) == 0
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


# --------------------------------------------------------------------- the search over layers too
LAYERS, KEPT = 6, 17  # of 4 * 6 pairs of a step and a layer
WANTED = [{0, 5}, {1}, set(), {2, 3, 4, 5}]  # what the target leaves out


def worth_both(genome: Genome) -> float:
    """Far from the target's timesteps, or with other layers, is worse; with fewer it is better."""
    wrong = sum(len(g.left_out ^ wanted) for g, wanted in zip(genome, WANTED, strict=True))
    return worth(genome) + wrong / 10


def thinning(seed: int) -> Evolution:
    generator = torch.Generator().manual_seed(seed)
    return Evolution(worth_both, 1000, 0, generator, LAYERS, 4 * LAYERS - KEPT)


def test_every_list_leaves_out_what_the_budget_asks_for() -> None:
    before, evolution = evolved(0), thinning(0)
    evolution.look(evolution.next(20, before.ranked(4)))  # from lists that leave nothing out
    for _ in range(6):
        evolution.look(evolution.next(20, evolution.ranked(4)))
    other = thinning(1)
    other.look(other.first(UNIFORM, 20))
    looked = [*evolution.found, *other.found]
    assert len(looked) == 8 * 20
    assert {count_left_out(genome) for genome in looked} == {4 * LAYERS - KEPT}
    assert all(gene.left_out <= set(range(LAYERS)) for genome in looked for gene in genome)
    counts = {tuple(len(gene.left_out) for gene in genome) for genome in looked}
    assert len(counts) > 20  # steps may share the budget unevenly


def test_lists_of_the_first_stage_hand_their_timesteps_on() -> None:
    parents = evolved(0).ranked(4)
    known = {gene.time for genome in parents for gene in genome}
    children = thinning(0).next(20, parents)
    assert sum(gene.time in known for genome in children for gene in genome) > 0.7 * 4 * 20


def test_a_mutant_exchanges_layers_and_a_crossing_takes_steps_whole() -> None:
    evolution = thinning(0)
    first = evolution.fitted(UNIFORM)
    mutants = [evolution.mutant(first) for _ in range(50)]
    changed = [m for m in mutants if m and [g.time for g in m] == [g.time for g in first]]
    assert changed and all(m != first for m in changed)  # other layers at the same timesteps
    for mutant in changed:
        pairs = zip(mutant, first, strict=True)
        assert 1 <= sum(len(a.left_out - b.left_out) for a, b in pairs) <= 4
    even = [Gene(gene.time, frozenset({0})) for gene in TARGET]
    evolution.num_left_out = 4  # as many as any choice of steps of these two leaves out
    odd = [Gene(gene.time - 1, frozenset({3})) for gene in TARGET]
    crossings = [evolution.crossing(tuple(even), tuple(odd)) for _ in range(50)]
    assert {gene for crossed in crossings for gene in crossed or ()} == {*even, *odd}
    evolution.num_left_out = 0
    assert evolution.fitted(first) == UNIFORM  # too many are put back


def test_the_best_with_layers_never_rises_and_beats_chance() -> None:
    ours, theirs = [], []
    for seed in range(12):
        evolution = thinning(seed)
        evolution.look(evolution.next(20, evolved(seed, generations=4).ranked(4)))
        for _ in range(8):
            evolution.look(evolution.next(20, evolution.ranked(4)))
        assert all(a >= b for a, b in zip(evolution.curve, evolution.curve[1:], strict=False))
        chance = thinning(100 + seed)
        count = len(evolution.found) + 5 * 20  # those of the first stage count too
        chance.look([chance.random(4) for _ in range(count)])
        ours.append(evolution.curve[-1])
        theirs.append(chance.curve[-1])
    assert sum(ours) < 0.9 * sum(theirs)


# ------------------------------------------------------------------------------ leaving layers out
FAMILIES = ("dit", "sd3", "flux", "wan", "hunyuandit", "unet", "sdxl")


def some_left_out(pipe: Any, share: float, *, steps: int = STEPS, seed: int = 0) -> Tensor:
    """(steps, layers) bool, so many of all pairs by chance."""
    count = len(layers_of(networks(pipe)[0]))
    luck = torch.Generator().manual_seed(seed)
    flat = torch.zeros(steps * count, dtype=torch.bool)
    flat[torch.randperm(steps * count, generator=luck)[: round(share * steps * count)]] = True
    return flat.view(steps, count)


def given(left_out: Tensor | None, wanted: list[float]) -> dict[str, Parts]:
    parts = {"timesteps": torch.tensor(wanted, dtype=torch.float64)}
    return {"auto_diffusion": parts if left_out is None else parts | {"left_out": left_out}}


TIMES = [990.0, 700.0, 420.0, 80.0]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_left_out_is_the_whole_network_bit_for_bit(family: str) -> None:
    pipe = tiny(family)
    whole, spent = made(pipe, family, "auto_diffusion", parts=given(None, TIMES))
    nothing = given(some_left_out(pipe, 0.0), TIMES)
    ours, activity = made(pipe, family, "auto_diffusion(layers=0.5)", parts=nothing)
    assert torch.equal(ours, whole) and activity == spent


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_layers_do_not_run_and_are_counted(family: str) -> None:
    pipe = tiny(family)
    left_out = some_left_out(pipe, 0.4)
    modules = layers_of(networks(pipe)[0])
    inside = [next(m for m in layer.modules() if is_work(m)) for layer in modules]
    with recording([*inside, networks(pipe)[0]]) as seen:
        pictures, activity = made(
            pipe, family, "auto_diffusion(layers=0.6)", parts=given(left_out, TIMES)
        )
    assert bool(pictures.isfinite().all())
    calls = len(seen.of(networks(pipe)[0])) // STEPS  # network calls of a step
    for number, module in enumerate(inside):
        uses = len(seen.of(module)) / calls / int((~left_out[:, number]).sum() or 1)
        assert uses == int(uses) and (uses > 0) == bool((~left_out[:, number]).any()), number
    assert activity["auto_diffusion.layers_left_out"] == int(left_out.sum()) * calls


def is_work(module: nn.Module) -> bool:
    """A layer with weights that a block or layer never does without, when it runs."""
    return isinstance(module, nn.Linear | nn.Conv2d)


def test_a_block_that_is_left_out_hands_its_input_on() -> None:
    pipe = tiny("dit")
    left_out = torch.zeros(STEPS, 3, dtype=torch.bool)
    left_out[2, 1] = True
    first, second, third = layers_of(networks(pipe)[0])
    inputs = [first.norm1, second.norm1, third.norm1]
    with recording([first, *inputs]) as seen:
        made(pipe, "dit", "auto_diffusion(layers=0.9)", parts=given(left_out, TIMES))
    assert [len(seen.of(norm)) for norm in inputs] == [4, 3, 4]
    assert torch.equal(seen.of(third.norm1)[2].args[0], seen.of(first)[2].output)
    assert not torch.equal(seen.of(third.norm1)[1].args[0], seen.of(first)[1].output)


def test_a_residual_layer_that_is_left_out_keeps_its_shortcut() -> None:
    pipe = tiny("unet")
    layers = layers_of(networks(pipe)[0])
    changes = [n for n, layer in enumerate(layers) if getattr(layer, "conv_shortcut", None)]
    assert changes and len(changes) < len(layers)
    left_out = torch.zeros(STEPS, len(layers), dtype=torch.bool)
    left_out[:, changes[0]] = True
    residual: Any = layers[changes[0]]
    with recording([residual, residual.conv_shortcut, residual.conv1]) as seen:
        made(pipe, "unet", "auto_diffusion(layers=0.9)", parts=given(left_out, TIMES))
    assert not seen.of(residual.conv1)
    assert len(seen.of(residual.conv_shortcut)) == STEPS
    for outer, inner in zip(seen.of(residual), seen.of(residual.conv_shortcut), strict=True):
        assert torch.equal(outer.output, inner.output)


def test_layers_that_change_the_size_and_the_ends_always_run() -> None:
    network: Any = networks(tiny("unet"))[0]
    optional = {id(m) for layer in layers_of(network) for m in layer.modules()}
    resizing = [m for name, m in network.named_modules() if name.endswith("samplers.0")]
    assert len(resizing) == 2
    for module in [network.conv_in, network.conv_out, network.time_embedding, *resizing]:
        assert id(module) not in optional
    pipe = tiny("unet")
    everything = some_left_out(pipe, 1.0)
    pictures, activity = made(
        pipe, "unet", "auto_diffusion(layers=0.1)", parts=given(everything, TIMES)
    )
    assert bool(pictures.isfinite().all())
    assert activity["auto_diffusion.layers_left_out"] == everything.numel()


def test_operations_are_those_of_the_budget() -> None:
    """All blocks of a plain transformer cost the same, so only their number counts."""
    pipe = tiny("dit")

    def spent(left_out: Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            made(pipe, "dit", "auto_diffusion(layers=0.5)", parts=given(left_out, TIMES))
        return int(counter.get_total_flops())

    whole, none = spent(some_left_out(pipe, 0.0)), spent(some_left_out(pipe, 1.0))
    one = (whole - none) / (STEPS * 3)
    for seed, share in enumerate((0.25, 0.5, 0.75)):
        left_out = some_left_out(pipe, share, seed=seed)
        assert spent(left_out) == whole - one * int(left_out.sum())


def test_a_loop_that_begins_later_leaves_out_what_belongs_to_its_timesteps() -> None:
    """A pipeline that starts from a picture walks the last entries of the list only."""
    pipe = tiny("unet_img2img")
    layers = layers_of(networks(pipe)[0])
    left_out = torch.zeros(8, len(layers), dtype=torch.bool)
    left_out[:2] = True  # three quarters of eight steps are walked
    left_out[5, 0] = True
    times_ = [900.0 - 110 * i for i in range(8)]
    activity = made(
        pipe, "unet_img2img", "auto_diffusion(steps=8, layers=0.7)", parts=given(left_out, times_)
    )[1]
    assert activity["calls"] == 6 and activity["auto_diffusion.layers_left_out"] == 1


def test_leaving_layers_out_takes_the_slot_of_block_reuse() -> None:
    steps_only, both = AutoDiffusion(), AutoDiffusion(layers=0.5)
    for other in ("delta_dit", "random_block_reuse", "sada(tokens=0.5)", "first_block_cache"):
        hasten.plan.Plan.parse(steps_only, other)
        with pytest.raises(PlanError, match="slot 'block'"):
            hasten.plan.Plan.parse(both, other)
    for other in ("zeus", "easy_cache", "adaptive_guidance", "grat", "adaspa"):
        hasten.plan.Plan.parse(both, other)
    # A compiled U-Net would leave out at every step what it left out when it was compiled.
    assert both.terms().runners == {"eager"}


def test_a_network_without_layers_is_refused() -> None:
    pipe = toy(lambda sample, timestep: sample, dpm())
    parts = given(torch.zeros(4, 0, dtype=torch.bool), TIMES)
    with hasten.apply(pipe, "auto_diffusion", parts=parts):
        pass
    with pytest.raises(SubjectError, match="has none; use layers=1"):
        hasten.apply(pipe, "auto_diffusion(layers=0.5)", parts=parts)


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


@pytest.mark.parametrize(("family", "search"), [("dit", "evolution"), ("unet", "random")])
def test_prepare_finds_layers_too(
    family: str, search: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny(family)
    technique = AutoDiffusion(search=search, layers=0.6, **{**SMALL, "generations": 4})
    wanted = preparation(pipe)
    if family == "dit":
        wanted.prompts, wanted.arguments = [3, 9], {"features": colours, "real": REAL}
    judged: list[Genome] = []
    judge = Fitness.__call__

    def watched(self: Fitness, genome: Genome) -> float:
        judged.append(genome)
        return judge(self, genome)

    monkeypatch.setattr(Fitness, "__call__", watched)
    parts = technique.prepare(wanted)
    count = len(layers_of(networks(pipe)[0]))
    out = 3 * count - round(0.6 * 3 * count)
    assert parts["left_out"].shape == (3, count) and parts["left_out"].dtype == torch.bool
    assert int(parts["left_out"].sum()) == out
    # First timesteps alone, then both; chance has nothing to hand on, and tries both at once.
    kinds = [count_left_out(genome) for genome in judged[1:]]
    switch = kinds.index(out)
    assert set(kinds[switch:]) == {out} and set(kinds[:switch]) <= {0}
    stages = {"curve": 3, "steps_curve": 2} if search == "evolution" else {"curve": 5}
    assert switch == (2 * 4 - 1 if search == "evolution" else 0)  # the even list was judged before
    for name, length in stages.items():
        assert len(parts[name]) == length and bool((parts[name].diff() <= 0).all())
    assert ("steps_curve" in parts) == (search == "evolution")
    with hasten.apply(pipe, technique, parts={"auto_diffusion": parts}) as fast:
        ours = picture(fast(**call(family)))
        assert fast.activity["auto_diffusion.layers_left_out"] == out
        hasten.save(fast, tmp_path)
    with hasten.load(tmp_path, pipe) as fast:
        assert torch.equal(picture(fast(**call(family))), ours)


def test_a_list_that_is_not_uniform_is_found_where_another_is_better() -> None:
    """The reference is drawn in uneven steps, so that the uniform list is clearly not the best."""
    pipe = tiny("unet")
    technique = AutoDiffusion(**{**SMALL, "population": 8, "generations": 2})
    judge = Fitness.of(technique, preparation(pipe))
    real = judge.draw(full([420.0, 60.0, 20.0]))
    parts = technique.prepare(preparation(pipe, real=real))
    assert float(parts["curve"][-1]) < 0.8 * float(parts["uniform"])
    assert full(parts["timesteps"].tolist()) != judge.uniform()


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
    assert frechet(first, first, shrink=SHRINK) == pytest.approx(0.0, abs=1e-6)
    # Between Gaussians along the axes: squared distance of means and of deviations.
    assert frechet(first, second, shrink=SHRINK) == pytest.approx(3.0 + 2.0, rel=0.05)


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


# ------------------------------------------------------------------------------ on a trained model
@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_chosen_layers_beat_as_many_by_chance() -> None:
    """By noises and captions that the search has not seen; the timesteps are the same."""
    name, plan = "scenes-dit", "auto_diffusion(steps=4, layers=0.75)"
    knobs: dict[str, Any] = {"population": 6, "generations": 3, "samples": 48, "batch": 48}
    size = drawn.draw(name, "", 1, num_inference_steps=1).pictures.shape[-1]
    scenes = prompts(48, 3)
    real = render([scene for _, scene in scenes], size)
    captions = [words for words, _ in scenes]
    asked = Preparation(
        open_subject(drawn.model(name)), [], prompts=captions, arguments={"real": real}
    )
    found = AutoDiffusion(steps=4, layers=0.75, **knobs).prepare(asked)

    def distance(left_out: Tensor) -> float:
        parts = {"auto_diffusion": found | {"left_out": left_out}}
        return drawn.draw(name, plan, 128, batch=64, parts=parts).frechet()

    pipe, share = drawn.model(name), float(found["left_out"].double().mean())
    chance = [some_left_out(pipe, share, seed=seed) for seed in range(4)]
    assert {int(one.sum()) for one in chance} == {int(found["left_out"].sum())}
    assert distance(found["left_out"]) < min(distance(one) for one in chance)


@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_a_found_list_is_as_good_on_noises_that_the_search_has_not_seen() -> (
    None
):
    """What it gains on the uniform list there is most of what it gains on the search's own noises.

    With so many of them: with a third, the search fits the few that it has, and gains nothing elsewhere.
    """
    pipe, samples = drawn.model("scenes-unet"), 144
    technique = AutoDiffusion(steps=4, population=8, generations=4, samples=samples, batch=48)
    gains = []
    for seed in (0, 1):  # of the captions and noises; the list is that of the first
        scenes = prompts(samples, 3 + seed)
        real = render([scene for _, scene in prompts(576, 30)], 64)
        asked = Preparation(
            open_subject(pipe),
            [],
            prompts=[words for words, _ in scenes],
            arguments={"real": real, "guidance_scale": 4.0},
        )
        if seed == 0:
            parts = technique.prepare(asked)
            found = full(parts["timesteps"].tolist())
        judge = Fitness.of(replace(technique, seed=seed), asked)
        gains.append(1 - judge(found) / judge(judge.uniform()))
    assert gains[0] > 0.1 and gains[1] > 0.5 * gains[0], gains
