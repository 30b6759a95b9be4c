"""Adaptive Guidance: what runs at each step, beside each sample's own cosines, and what it saves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.blocks import blocks
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.guider.adaptive_guidance import AdaptiveGuidance
from hasten.denoise.guider.fixed_guidance_cut import FixedGuidanceCut
from hasten.denoise.guider.linear import Way, explained, fit, predict
from hasten.denoise.levels import level
from hasten.errors import HastenError, PlanError
from hasten.measure.image_quality import psnr
from hasten.preparation import Preparation
from hasten.subject import open_subject
from hasten.zoo.scenes.caption import prompts
from tests import pipelines
from tests.pipelines import picture, tiny
from tests.techniques import drawn

BATCHED = ("dit", "unet", "pixart")
APART = ("cogview4", "wan")
STEPS = 6


def call(family: str, **more: Any) -> dict[str, Any]:
    return pipelines.call(family, num_inference_steps=STEPS, **more)


def rows_of(pipe: Any) -> tuple[list[int], Any]:
    """Rows of every forward pass, counted at a layer inside the network."""
    network = getattr(pipe, "transformer", None) or pipe.unet
    inner = network.conv_in if hasattr(network, "conv_in") else blocks(network)[0]
    seen: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(len(args[0] if args else kwargs["hidden_states"]))

    return seen, inner.register_forward_pre_hook(note, with_kwargs=True)


def run(plan: str, family: str, pipe: Any = None, **more: Any) -> tuple[Tensor, DenoiseModel]:
    pipe = pipe or tiny(family)
    with hasten.apply(pipe, plan) as fast:
        return picture(fast(**call(family, **more))), fast


@pytest.mark.parametrize("family", [*BATCHED, *APART])
def test_it_is_not_there_at_the_threshold_that_nothing_passes(family: str) -> None:
    plain = picture(tiny(family)(**call(family)))
    made, fast = run("adaptive_guidance(threshold=1.0)", family)
    assert torch.equal(made, plain)
    assert not any(key.startswith("adaptive_guidance") for key in fast.activity)
    assert fast.activity["rows"] == 2 * STEPS


@pytest.mark.parametrize("family", [*BATCHED, *APART])
def test_the_lowest_threshold_guides_one_step_and_the_network_really_runs_less(family: str) -> None:
    pipe = tiny(family)
    seen, handle = rows_of(pipe)
    made, fast = run("adaptive_guidance(threshold=-1.0)", family, pipe)
    handle.remove()
    assert sum(seen) == fast.activity["rows"] == 2 + (STEPS - 1)
    assert fast.activity["left_out"] == STEPS - 1
    assert fast.activity["adaptive_guidance.switched_at_1"] == 1
    plain = picture(tiny(family)(**call(family)))
    assert not torch.equal(made, plain)


def test_after_the_switch_it_is_the_conditional_model() -> None:
    """The pipeline's own loop, told by its callback to stop guiding after the first step."""

    def stop(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return tensors

    expected = picture(tiny("cogview4")(**call("cogview4", callback_on_step_end=stop)))
    made, _ = run("adaptive_guidance(threshold=-1.0)", "cogview4")
    assert torch.equal(made, expected)

    def stop_and_cut(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]} if step == 0 else tensors

    more = {
        "callback_on_step_end": stop_and_cut,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }
    expected = picture(tiny("unet")(**call("unet", **more)))
    made, _ = run("adaptive_guidance(threshold=-1.0)", "unet")
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["unet", "cogview4"])
@pytest.mark.parametrize("threshold", [-1.0, 0.9, 1.0])
def test_it_cannot_be_seen_without_guidance(family: str, threshold: float) -> None:
    plain = picture(tiny(family)(**call(family, guidance_scale=1.0)))
    made, fast = run(f"adaptive_guidance(threshold={threshold})", family, guidance_scale=1.0)
    assert torch.equal(made, plain)
    assert set(fast.activity) == {"calls", "rows", "steps"}


def plain_cosines(family: str, **more: Any) -> Tensor:
    """(steps, samples) cosines along the fully guided way, by the sheet's formula."""
    pipe = tiny(family)
    network = getattr(pipe, "transformer", None) or pipe.unet
    outputs: list[Tensor] = []
    handle = network.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    fast = DenoiseModel(hasten.subject.open_subject(pipe), hasten.plan.Plan(()), exclusive=False)
    made = fast.start()
    made.trace = []
    fast._execute(made, **call(family, **more))
    handle.remove()
    found = []
    for step in made.trace:
        if family == "cogview4":  # a call for each branch; a flow, so clean samples are compared
            conditional, unconditional = outputs[2 * step.index : 2 * step.index + 2]
            sigma = pipe.scheduler.sigmas[step.index]
            pair = [step.sample - sigma * v for v in (conditional, unconditional)]
        else:  # predicts noise; the unconditional half comes first
            pair = list(outputs[step.index].chunk(2))
        flat = [tensor.double().flatten(1) for tensor in pair]
        found.append(torch.cosine_similarity(*flat, dim=1))
    return torch.stack(found)


@pytest.mark.parametrize("family", ["unet", "cogview4"])
def test_each_sample_switches_where_its_own_cosine_says(family: str) -> None:
    prompts = ["a red circle", "zzz", "blue square left of it"]
    more = {"prompt": prompts, "negative_prompt": ["blurred"] * 3}
    cosines = plain_cosines(family, **more)
    middle = cosines[:-2].max(dim=0).values.sort().values
    # Passed by some samples and not by others.
    threshold = float((middle[0] + middle[1]) / 2)
    expected = []
    for column in cosines.T:
        passed = (column >= threshold).nonzero()
        expected.append(int(passed[0]) + 1 if len(passed) else STEPS)
    what = "noise" if family == "unet" else "clean"  # as `plain_cosines`
    plan = f"adaptive_guidance(threshold={threshold!r}, compare_as={what})"
    _made, fast = run(plan, family, **more)
    assert len(set(expected)) > 1
    assert fast.activity["rows"] == sum(2 * k + (STEPS - k) for k in expected)
    found = sorted(
        int(key.rsplit("_", 1)[1])
        for key, count in fast.activity.items()
        if "switched_at" in key
        for _ in range(count)
    )
    assert found == sorted(k for k in expected if k < STEPS)
    # A sample is the same in whatever company.
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    together, _ = run(plan, family, latents=latents, **more)
    for row, prompt in enumerate(prompts):
        alone, _ = run(plan, family, latents=latents[row : row + 1], prompt=prompt)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=0)


def test_what_is_compared_is_what_the_knob_says() -> None:
    scheduler = tiny("unet").scheduler
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    sample, first, second = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    at = level(scheduler, 3, scheduler.timesteps[3])

    class Run:
        guidance = hasten.denoise.guidance.Guidance(True, 1, 3.0)

        def __init__(self) -> None:
            self.scheduler = scheduler

        def level(self, step: Any) -> Any:
            return at

    step = hasten.denoise.run.Step(3, scheduler.timesteps[3], first, sample, True)
    clean = [(sample - at.sigma * eps) / at.alpha for eps in (first, second)]
    for what, pair in {"noise": [first, second], "clean": clean}.items():
        technique = AdaptiveGuidance(compare_as=what)
        found = technique.cosine(Run(), first, second, step)  # type: ignore[arg-type]
        expected = torch.cosine_similarity(*(p.double().flatten(1) for p in pair), dim=1)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", ["unet", "cogview4"])
def test_negative_prompts_still_count(family: str) -> None:
    plan = "adaptive_guidance(threshold=-1.0)"
    first, _ = run(plan, family, negative_prompt="blurred")
    second, _ = run(plan, family, negative_prompt="green")
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", ["dit", "cogview4"])
def test_a_second_call_and_bfloat16(family: str) -> None:
    with hasten.apply(tiny(family), "adaptive_guidance(threshold=-1.0)") as fast:
        first, second = (picture(fast(**call(family))) for _ in range(2))
        assert torch.equal(first, second)
    pipe = tiny(family, dtype=torch.bfloat16)
    made, fast = run("adaptive_guidance(threshold=-1.0)", family, pipe)
    assert fast.activity["rows"] == STEPS + 1 and bool(made.isfinite().all())


@pytest.mark.parametrize("family", ["unet", "wan"])
def test_the_fixed_cut_guides_in_its_part_of_the_way(family: str) -> None:
    plain = picture(tiny(family)(**call(family)))
    made, fast = run("fixed_guidance_cut(first=0.0, last=1.0)", family)
    assert torch.equal(made, plain) and fast.activity["rows"] == 2 * STEPS
    early, fast = run("fixed_guidance_cut(last=0.5)", family)
    assert fast.activity["rows"] == STEPS + STEPS // 2
    late, fast = run("fixed_guidance_cut(first=0.5, last=1.0)", family)
    assert fast.activity["rows"] == STEPS + STEPS // 2 + 1
    assert not torch.equal(early, late)
    one, _ = run(f"fixed_guidance_cut(last={1 / STEPS})", family)
    same, _ = run("adaptive_guidance(threshold=-1.0)", family)
    assert torch.equal(one, same)


# -------------------------------------------------------------------------------------- LinearAG
def prepared(family: str, pipe: Any, count: int = 16) -> dict[str, Tensor]:
    technique = AdaptiveGuidance(linear=True, steps=STEPS)
    given = call(family, guidance_scale=3.0)
    for name in ("prompt", "generator", "num_inference_steps", "class_labels"):
        given.pop(name, None)
    prompts = [3, 9, 12] if family == "dit" else ["a red circle", "zzz", "blue", "green square"]
    preparation = Preparation(open_subject(pipe), [], count, prompts=prompts, arguments=given)
    return technique.prepare(preparation)


def test_the_fit_finds_coefficients_that_are_there() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = 5
    conditional = list(torch.randn(steps, 200, generator=generator, dtype=torch.float64))
    unconditional = [0.5 * conditional[0]]
    for i in range(1, steps):
        unconditional.append(
            0.7 * conditional[i] - 0.2 * conditional[i - 1] + 0.4 * unconditional[i - 1]
        )
    products = Way(conditional, unconditional).products()
    parts = fit(products)
    torch.testing.assert_close(explained(products, parts), torch.ones(steps, dtype=torch.float64))
    way = Way(conditional[:3], unconditional[:3])
    torch.testing.assert_close(predict(parts, way, conditional[3]), unconditional[3])
    # Coefficients of other steps say nothing.
    mixed = {name: table.roll(1, dims=0) for name, table in parts.items()}
    assert float(explained(products, mixed)[2:].max()) < 0.9


@pytest.mark.parametrize("family", ["unet", "cogview4", "dit"])
def test_the_fit_stands_for_the_branch_at_its_steps(family: str) -> None:
    pipe = tiny(family)
    parts = prepared(family, pipe)
    plan = f"adaptive_guidance(linear=true, steps={STEPS}, threshold=1.0)"
    plain = picture(tiny(family)(**call(family)))
    with hasten.apply(pipe, plan, parts={"adaptive_guidance": parts}) as fast:
        made = picture(fast(**call(family)))
    real = sum(1 for i in range(STEPS // 2) if i % 2 == 0)
    assert fast.activity["rows"] == STEPS + real
    assert fast.activity["adaptive_guidance.fitted"] == STEPS - real
    mixed = {name: table.roll(2, dims=0) for name, table in parts.items()}
    with hasten.apply(pipe, plan, parts={"adaptive_guidance": mixed}) as fast:
        wrong = picture(fast(**call(family)))
    error, other = (float((p - plain).square().mean()) for p in (made, wrong))
    if family == "dit":  # its classes are random vectors, and none says anything of another
        assert not torch.equal(made, wrong)
    else:
        assert bool((parts["explained"][1:] > 0.4).all()) and error < 0.5 * other


def test_linear_needs_its_fit_for_as_many_steps() -> None:
    pipe = tiny("cogview4")
    with pytest.raises(PlanError, match="no trained part"):
        hasten.apply(pipe, "adaptive_guidance(linear=true)")
    parts = {"adaptive_guidance": prepared("cogview4", pipe, 4)}
    with (
        hasten.apply(pipe, f"adaptive_guidance(linear=true, steps={STEPS})", parts=parts) as fast,
        pytest.raises(HastenError, match="was fitted for"),
    ):
        fast(**pipelines.call("cogview4", num_inference_steps=STEPS + 1))
    with pytest.raises(PlanError, match="a network call at every step"):
        hasten.plan.Plan.parse("adaptive_guidance(linear=true), zeus")


def test_two_guiders_are_refused() -> None:
    with pytest.raises(PlanError, match="guider"):
        hasten.plan.Plan.parse("adaptive_guidance, fixed_guidance_cut")
    with pytest.raises(PlanError, match="threshold"):
        hasten.plan.Plan.parse("adaptive_guidance(threshold=1.5)")


# --------------------------------------------------------------------------------- trained models
@pytest.mark.zoo
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["scenes-dit", "scenes-unet"])
def test_on_a_trained_model_it_saves_a_part_and_keeps_the_picture(name: str) -> None:
    drawn.model(name)
    full = drawn.draw(name, "", num_inference_steps=20)
    ours = drawn.draw(name, "adaptive_guidance", num_inference_steps=20)
    saved = 1 - ours.activity["rows"] / full.activity["rows"]
    assert 0.1 < saved < 0.45
    assert ours.ssim(full) > 0.95
    assert ours.attributes() > full.attributes() - 0.03
    switched = {key for key in ours.activity if "switched_at" in key}
    assert len(switched) > 1  # each prompt at its own step
    rows = int(ours.activity["rows"]) / len(ours.pictures)
    guided = round(rows - 20) / 20
    early = drawn.draw(name, f"fixed_guidance_cut(last={guided})", num_inference_steps=20)
    late = drawn.draw(
        name, f"fixed_guidance_cut(first={1 - guided}, last=1.0)", num_inference_steps=20
    )
    assert early.psnr(full) > late.psnr(full) + 3
    assert ours.psnr(full) > late.psnr(full) + 3


@pytest.mark.zoo
@pytest.mark.thorough
@pytest.mark.parametrize(("name", "least"), [("scenes-dit", 2), ("scenes-unet", -2)])
def test_on_a_trained_model_evaluations_are_better_spent_than_on_fewer_guided_steps(
    name: str, least: int
) -> None:
    """A guided step is two evaluations; the sampler of fewer steps makes as many or more of them.

    By more than two standard errors for velocities. The model of noise loses little by fewer steps
    of DDIM, and stops being guided after a third of them: it does as well, and no better.
    """
    count, steps = 24, 20
    full = drawn.draw(name, "", count, num_inference_steps=steps)
    ours = drawn.draw(name, "adaptive_guidance", count, num_inference_steps=steps)
    as_many = math.ceil(ours.activity["rows"] / (2 * count))
    fewer = drawn.draw(name, f"fewer_steps(steps={as_many})", count, num_inference_steps=steps)
    assert ours.activity["rows"] <= fewer.activity["rows"] < full.activity["rows"]
    gain = psnr(ours.array, full.array) - psnr(fewer.array, full.array)
    error = gain.std(ddof=1) / count**0.5
    assert gain.mean() > least * error, (gain.mean(), error)


@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_branches_are_linear_in_what_came_before() -> None:
    pipe = drawn.model("scenes-dit")
    captions = [words for words, _ in prompts(48, 3)]
    technique = AdaptiveGuidance(linear=True, steps=12)
    parts = technique.prepare(Preparation(open_subject(pipe), [], 48, prompts=captions))
    assert bool((parts["explained"][1:] > 0.95).all())
    full = drawn.draw("scenes-dit", "", 8, num_inference_steps=12)
    plan = "adaptive_guidance(linear=true, steps=12, threshold=1.0)"
    mixed = {key: table.roll(2, dims=0) for key, table in parts.items()}
    made = {
        word: drawn.draw(
            "scenes-dit", plan, 8, num_inference_steps=12, parts={"adaptive_guidance": given}
        )
        for word, given in {"fit": parts, "mixed": mixed}.items()
    }
    assert made["fit"].psnr(full) > made["mixed"].psnr(full) + 5


@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_guidance_matters_early_and_not_at_random_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The branches come together along the way; as many guided steps by chance are worth far less."""
    name, count, steps = "scenes-unet", 6, 20
    cosines: list[Tensor] = []
    original = AdaptiveGuidance.cosine

    def noted(self: AdaptiveGuidance, *given: Any) -> Tensor:
        cosines.append(original(self, *given))
        return cosines[-1]

    with monkeypatch.context() as patch:
        patch.setattr(AdaptiveGuidance, "cosine", noted)
        never = "adaptive_guidance(threshold=0.9999999)"
        full = drawn.draw(name, never, count, num_inference_steps=steps)
    found = torch.stack(cosines).mean(dim=1)
    assert 0.6 < float(found[0]) < 0.95 and float(found[-1]) > 0.99
    assert bool((found.diff() > -0.01).all())
    ours = drawn.draw(name, "adaptive_guidance", count, num_inference_steps=steps)
    guided = math.ceil(ours.activity["rows"] / count - steps)
    luck = torch.Generator().manual_seed(0)
    chosen = {0, *(torch.randperm(steps - 1, generator=luck)[: guided - 1] + 1).tolist()}

    def by_chance(self: FixedGuidanceCut, state: Any, run: Any, call: Any) -> Tensor:
        return torch.full((state.samples,), run.index in chosen)

    monkeypatch.setattr(FixedGuidanceCut, "wanted", by_chance)
    chance = drawn.draw(name, "fixed_guidance_cut", count, num_inference_steps=steps)
    assert ours.activity["rows"] <= chance.activity["rows"]
    gain = psnr(ours.array, full.array) - psnr(chance.array, full.array)
    assert gain.mean() > 2 * gain.std(ddof=1) / count**0.5
