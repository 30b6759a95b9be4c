"""Plain rivals of the gates: reuse at fixed steps, fewer steps, and Diffusers' own caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from hasten.errors import PlanError, SubjectError
from hasten.plan import Plan
from tests import pipelines
from tests.techniques.trajectories import flow, mixture, record, toy


def made(pipe: Any, family: str, plan: str | None = None, **call: Any) -> tuple[torch.Tensor, Any]:
    """A picture, with a plan or without, and the counters of the call."""
    if plan is None:
        return pipelines.picture(pipe(**pipelines.call(family, **call))), None
    with hasten.apply(pipe, plan) as fast:
        return pipelines.picture(fast(**pipelines.call(family, **call))), fast.activity


# ------------------------------------------------------------------------------------ reuse_always
@pytest.mark.parametrize("interval", [2, 3, 7])
def test_one_of_so_many_steps_runs_and_its_output_stays(interval: int) -> None:
    noted = record(
        toy(mixture(), flow()), f"reuse_always(interval={interval})", num_inference_steps=20
    )
    assert noted.ran == [i % interval == 0 for i in range(20)]
    for before, step in zip(noted.steps, noted.steps[1:], strict=False):
        assert step.ran or torch.equal(step.output, before.output)


@pytest.mark.parametrize("family", ["dit", "cogview4"])
def test_an_interval_of_one_is_the_pipeline_itself(family: str) -> None:
    pipe = pipelines.tiny(family)
    assert torch.equal(made(pipe, family)[0], made(pipe, family, "reuse_always(interval=1)")[0])


# ------------------------------------------------------------------------------------- fewer_steps
@pytest.mark.parametrize(
    "family", ["dit", "sd3", "flux", "pixart", "sana", "cogview4", "wan", "ltx"]
)
def test_fewer_steps_are_those_of_the_pipeline_at_that_number(family: str) -> None:
    pipe = pipelines.tiny(family)
    expected, _ = made(pipe, family, num_inference_steps=5)
    picture, counted = made(pipe, family, "fewer_steps(share=0.25)", num_inference_steps=20)
    assert torch.equal(picture, expected)
    assert counted["steps"] == 5 and counted["fewer_steps.left_out"] == 15


def test_pictures_to_begin_with_keep_their_strength() -> None:
    pipe = pipelines.tiny("unet", kind="StableDiffusionImg2ImgPipeline")
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {"height": ..., "width": ..., "image": image, "strength": 0.6}
    expected, _ = made(pipe, "unet", num_inference_steps=10, **call)
    picture, counted = made(pipe, "unet", "fewer_steps", num_inference_steps=20, **call)
    assert torch.equal(picture, expected) and counted["steps"] == 6


def test_noise_levels_that_are_given_are_thinned_out() -> None:
    pipe = pipelines.tiny("flux")
    sigmas = [1.0 - i / 12 for i in range(12)]
    expected, _ = made(pipe, "flux", sigmas=sigmas[::3])
    assert torch.equal(made(pipe, "flux", "fewer_steps(steps=4)", sigmas=sigmas)[0], expected)


def test_the_number_that_the_pipeline_takes_by_default_counts() -> None:
    pipe = pipelines.tiny("unet")
    _, counted = made(pipe, "unet", "fewer_steps(share=0.1)", num_inference_steps=...)
    assert counted["steps"] == 5


def test_as_many_steps_as_were_asked_for_change_nothing() -> None:
    pipe = pipelines.tiny("unet")
    expected, _ = made(pipe, "unet")
    for plan in ("fewer_steps(share=1.0)", "fewer_steps(steps=9)"):
        picture, counted = made(pipe, "unet", plan)
        assert torch.equal(picture, expected) and "fewer_steps.left_out" not in counted


# ------------------------------------------------------------------------------ caches of Diffusers
CACHES = {
    "first_block_cache(threshold=9.0)": ("dit", "flux", "cogview4", "wan", "cogvideox"),
    "taylorseer_cache(interval=3)": ("dit", "sd3", "unet", "cogview4"),
    "taylorseer_cache(lite=true)": ("dit", "cogview4", "flux"),
    "pyramid_attention_broadcast": ("dit", "unet", "cogview4", "wan"),
    "faster_cache": ("dit", "sd3", "cogview4", "cogvideox"),
    "sea_cache(threshold=9.0)": ("dit", "cogview4", "wan"),
}
NEUTRAL = (
    "first_block_cache(threshold=0.0)",
    "taylorseer_cache(interval=1)",
    "pyramid_attention_broadcast(interval=1)",
    "faster_cache(interval=1, guidance_interval=1)",
    "sea_cache(threshold=0.0)",
)


@pytest.mark.parametrize(
    ("plan", "family"), [(plan, family) for plan, kinds in CACHES.items() for family in kinds]
)
def test_a_cache_acts_and_leaves_no_trace(plan: str, family: str) -> None:
    pipe = pipelines.tiny(family)
    network = pipe.unet if family == "unet" else pipe.transformer
    expected, _ = made(pipe, family, num_inference_steps=8)
    traces = [sorted(vars(module)) for module in network.modules()]
    first, counted = made(pipe, family, plan, num_inference_steps=8)
    again, _ = made(pipe, family, plan, num_inference_steps=8)
    assert counted[f"{plan.split('(')[0]}.reused"] > 0
    assert not torch.equal(first, expected) and bool(first.isfinite().all())
    assert torch.equal(first, again)
    assert torch.equal(made(pipe, family, num_inference_steps=8)[0], expected)
    assert [sorted(vars(module)) for module in network.modules()] == traces


@pytest.mark.parametrize("plan", NEUTRAL)
def test_a_cache_that_never_reuses_is_the_pipeline_itself(plan: str) -> None:
    family = "cogview4"
    pipe = pipelines.tiny(family)
    picture, counted = made(pipe, family, plan, num_inference_steps=8)
    assert torch.equal(picture, made(pipe, family, num_inference_steps=8)[0])
    assert not any(name.endswith(".reused") for name in counted)


def test_it_is_diffusers_own_cache() -> None:
    """The same pictures as `enable_cache` makes where the pipeline itself names its calls."""
    from diffusers import FirstBlockCacheConfig

    pipe = pipelines.tiny("cogview4")
    plan = "first_block_cache(threshold=1.0)"
    ours, counted = made(pipe, "cogview4", plan, num_inference_steps=20)
    assert 0 < counted["first_block_cache.reused"] < 2 * 19 * 2
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    try:
        theirs, _ = made(pipe, "cogview4", num_inference_steps=20)
    finally:
        pipe.transformer.disable_cache()
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("plan", "family"),
    [
        ("first_block_cache", "unet"),
        ("first_block_cache", "sana"),
        ("first_block_cache", "sd3"),
        ("sea_cache", "sd3"),
        ("sea_cache", "unet"),
        ("faster_cache", "unet"),
    ],
)
def test_a_network_that_a_cache_does_not_know_is_named(plan: str, family: str) -> None:
    pipe = pipelines.tiny(family)
    network = pipe.unet if family == "unet" else pipe.transformer
    traces = [sorted(vars(module)) for module in network.modules()]
    with pytest.raises(SubjectError, match=f"{plan} (does not support|finds no layer)"):
        hasten.apply(pipe, plan)
    assert [sorted(vars(module)) for module in network.modules()] == traces


def test_branches_that_run_one_after_the_other_share_no_memory() -> None:
    """Diffusers gives these hooks one memory; the second call of a step would get the first's."""
    pipe = pipelines.tiny("cogview4")
    call = {"num_inference_steps": 8, "guidance_scale": 4.0}
    with hasten.apply(pipe, "pyramid_attention_broadcast(first=1000, last=0)") as fast:
        run = fast.start()
        kept: list[list[torch.Tensor]] = []
        compare = run._compare
        run._compare = lambda step: kept.append(list(run.computed)) or compare(step)
        fast._execute(run, **pipelines.call("cogview4", **call))
    assert len(kept) == 8
    assert all(not torch.equal(*outputs) for outputs in kept)


def test_mag_cache_measures_its_ratios(tmp_path: Any) -> None:
    pipe = pipelines.tiny("cogview4")
    arguments = {"num_inference_steps": 6, "height": 16, "width": 16, "negative_prompt": "no"}
    parts = hasten.prepare(
        pipe,
        "mag_cache",
        prompts=["a red circle", "a blue square"],
        arguments=arguments,
        write=False,
    )
    ratios = parts["mag_cache"]["ratios"]
    assert ratios.shape == (6,) and ratios[0] == 1.0 and bool((ratios > 0).all())
    with hasten.apply(pipe, "mag_cache(threshold=9.0)", parts=parts) as fast:
        fast(**pipelines.call("cogview4", num_inference_steps=12))
        assert fast.activity["mag_cache.reused"] > 0
    with hasten.apply(pipe, "mag_cache(max_skips=0)", parts=parts) as fast:
        picture = pipelines.picture(fast(**pipelines.call("cogview4", num_inference_steps=12)))
    assert torch.equal(picture, made(pipe, "cogview4", num_inference_steps=12)[0])


def test_two_gates_do_not_stand_in_one_plan() -> None:
    for pair in ("zeus, easy_cache", "sada, first_block_cache", "reuse_always, dual_fast"):
        with pytest.raises(PlanError, match="gate"):
            Plan.parse(pair)
    Plan.parse("zeus, fewer_steps")
