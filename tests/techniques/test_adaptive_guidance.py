"""Adaptive Guidance: what runs at each step, beside each sample's own cosines, and what it saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.blocks import blocks
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.guider.adaptive_guidance import AdaptiveGuidance
from hasten.denoise.levels import level
from hasten.errors import PlanError
from tests import pipelines
from tests.pipelines import picture, tiny

BATCHED = ("dit", "unet", "sd3", "pixart")
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
    made, fast = run(f"adaptive_guidance(threshold={threshold!r})", family, **more)
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
    together, _ = run(
        f"adaptive_guidance(threshold={threshold!r})", family, latents=latents, **more
    )
    for row, prompt in enumerate(prompts):
        alone, _ = run(
            f"adaptive_guidance(threshold={threshold!r})",
            family,
            latents=latents[row : row + 1],
            prompt=prompt,
        )
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


def test_two_guiders_are_refused() -> None:
    with pytest.raises(PlanError, match="guider"):
        hasten.plan.Plan.parse("adaptive_guidance, fixed_guidance_cut")
    with pytest.raises(PlanError, match="threshold"):
        hasten.plan.Plan.parse("adaptive_guidance(threshold=1.5)")
