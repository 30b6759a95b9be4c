"""Noise levels beside what each of Diffusers' schedulers itself makes of an output."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.levels import Level, check_levels, is_flow, level
from hasten.errors import SubjectError
from tests.pipelines import call, tiny

SHAPE = (2, 4, 8, 8)
STEPS = 6
TABLE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
CLIPPED = {"clip_sample": False}
SHIFTED = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
KINDS = ("epsilon", "v_prediction", "sample")


def scheduler_of(name: str, **settings: Any) -> Any:
    return getattr(diffusers, f"{name}Scheduler")(**settings)


def close(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=2e-4, atol=2e-4)


def walk(scheduler: Any) -> Any:
    """(level, output, sample, what the scheduler returns) of a loop with outputs drawn by chance."""
    torch.manual_seed(0)
    scheduler.set_timesteps(STEPS)
    sample = torch.randn(SHAPE) * scheduler.init_noise_sigma
    for index, time in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(sample, time)
        output = torch.randn(SHAPE)
        found = level(scheduler, index, time)
        yield found, output, sample, lambda t=time, o=output, x=sample: scheduler.step(o, t, x)
        sample = torch.randn(SHAPE) * scheduler.init_noise_sigma * 0.9


def agrees(found: Level, output: Tensor, sample: Tensor) -> None:
    """The two estimates make up the sample, and each gives the output back."""
    clean, noise = found.clean(output, sample), found.noise(output, sample)
    close(found.alpha * clean + found.sigma * noise, found.scale * sample)
    if found.sigma > 0.02:  # data alone says nothing of the noise
        close(found.output_of_clean(clean, sample), output)
    if found.alpha > 0.02:  # nor noise alone of the data
        close(found.output_of_noise(noise, sample), output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIM", CLIPPED),
        ("DDPM", CLIPPED),
        ("EulerDiscrete", {}),
        ("EulerDiscrete", {"use_karras_sigmas": True}),
        ("EulerAncestralDiscrete", {}),
        ("HeunDiscrete", {}),
        ("LMSDiscrete", {}),
        ("CogVideoXDDIM", {**CLIPPED, "rescale_betas_zero_snr": False}),
    ],
)
def test_the_clean_sample_is_the_schedulers(name: str, settings: dict[str, Any], kind: str) -> None:
    if name == "EulerAncestralDiscrete" and kind == "sample":
        return  # that scheduler has not implemented it
    scheduler = scheduler_of(name, **TABLE, **settings, prediction_type=kind)
    for found, output, sample, step in walk(scheduler):
        assert found.kind == kind
        if name == "LMSDiscrete" and kind == "sample":
            continue  # nor has this one
        close(found.clean(output, sample), step().pred_original_sample)
        agrees(found, output, sample)


@pytest.mark.parametrize("kind", [*KINDS, "flow_prediction"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DPMSolverMultistep", {}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestep", {}),
        ("UniPCMultistep", {}),
        ("UniPCMultistep", {"use_karras_sigmas": True}),
        ("SASolver", {}),
    ],
)
def test_the_clean_sample_is_the_solvers(name: str, settings: dict[str, Any], kind: str) -> None:
    flow = SHIFTED if kind == "flow_prediction" else {"prediction_type": kind}
    scheduler = scheduler_of(name, **TABLE, **settings, **flow)
    for found, output, sample, step in walk(scheduler):
        assert found.kind == ("flow" if kind == "flow_prediction" else kind)
        step()  # sets the place, and moves it on by one
        scheduler._step_index -= 1
        close(found.clean(output, sample), scheduler.convert_model_output(output, sample=sample))
        scheduler._step_index += 1
        agrees(found, output, sample)


def test_deis_goes_by_the_noise() -> None:
    scheduler = scheduler_of("DEISMultistep", **TABLE)
    for found, output, sample, step in walk(scheduler):
        step()
        scheduler._step_index -= 1
        close(found.noise(output, sample), scheduler.convert_model_output(output, sample=sample))
        scheduler._step_index += 1


FLOWS: list[tuple[str, dict[str, Any]]] = [
    ("FlowMatchEulerDiscrete", {}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),
    ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
    ("FlowMatchHeunDiscrete", {}),
]


@pytest.mark.parametrize(("name", "settings"), FLOWS)
def test_a_flow_goes_straight_from_noise_to_data(name: str, settings: dict[str, Any]) -> None:
    """A first-order step mixes both estimates anew, by the next level's shares."""
    scheduler = scheduler_of(name, **settings)
    torch.manual_seed(0)
    scheduler.set_timesteps(STEPS)
    sample = torch.randn(SHAPE)
    assert is_flow(scheduler)
    for index, time in enumerate(scheduler.timesteps[:-1]):
        output = torch.randn(SHAPE)
        found = level(scheduler, index, time)
        assert found.kind == "flow" and found.alpha + found.sigma == pytest.approx(1.0)
        agrees(found, output, sample)
        result = scheduler.step(output, time, sample).prev_sample
        if name == "FlowMatchHeunDiscrete" and index % 2:
            sample = result  # the second half of a step corrects the first
            continue
        following = level(scheduler, index + 1, None)
        assert following.sigma < found.sigma
        clean, noise = found.clean(output, sample), found.noise(output, sample)
        close(result, following.alpha * clean + following.sigma * noise)
        sample = result


def test_halfway_steps_of_a_second_order_solver() -> None:
    """The first half of KDPM2's step ends at the level that the second half starts from."""
    scheduler = scheduler_of("KDPM2Discrete", **TABLE)
    scheduler.set_timesteps(STEPS)
    torch.manual_seed(0)
    sample = torch.randn(SHAPE) * scheduler.init_noise_sigma
    for index, time in enumerate(scheduler.timesteps[:-1]):
        output = torch.randn(SHAPE)
        found = level(scheduler, index, time)
        result = scheduler.step(output, time, sample).prev_sample
        if index % 2 == 0:
            after = level(scheduler, index + 1, None)
            clean, noise = found.clean(output, sample), found.noise(output, sample)
            close(after.scale * result, after.alpha * clean + after.sigma * noise)
        sample = result


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "HeunDiscrete",
        "LMSDiscrete",
        "KDPM2Discrete",
        "KDPM2AncestralDiscrete",
    ],
)
def test_samples_are_scaled_for_the_network_as_the_scheduler_does(name: str) -> None:
    """At every step, also at those that second-order solvers make halfway."""
    scheduler, ones = scheduler_of(name, **TABLE), torch.ones(SHAPE)
    scheduler.set_timesteps(STEPS)
    for index, time in enumerate(scheduler.timesteps):
        found = level(scheduler, index, time)
        close(scheduler.scale_model_input(ones, time), found.scale * ones)
        assert index == len(scheduler.timesteps) - 1 or found.sigma > 0.0
        scheduler.step(torch.zeros(SHAPE), time, ones)


ORDER_ONE = {
    "unet": "DDIMScheduler",
    "unet_img2img": "DDIMScheduler",
    "sdxl": None,
    "sdxl_img2img": None,
    "sd3": None,
    "sd3_img2img": None,
    "flux_inpaint": None,
    "cogview4": None,
    "cogvideox": None,
    "ltx": None,
    "z_image": None,
    "lumina2": None,
    "mochi": None,
}


@pytest.mark.parametrize("name", ORDER_ONE)
def test_each_step_of_a_pipeline_ends_at_the_level_of_the_next(name: str) -> None:
    pipe = tiny(name, scheduler=ORDER_ONE[name])
    fast = hasten.apply(pipe, "")
    assert isinstance(fast, DenoiseModel)
    run = fast.start()
    run.trace = []
    fast._execute(run, **call(name))
    assert len(run.trace) == run.num_steps
    for step, following in zip(run.trace, run.trace[1:], strict=False):
        found, after = run.level(step), run.level(following)
        assert after.sigma < found.sigma
        clean = found.clean(step.output, step.sample)
        noise = found.noise(step.output, step.sample)
        assert step.result is not None
        close(after.scale * step.result, after.alpha * clean + after.sigma * noise)


@pytest.mark.parametrize("name", ["EDMEuler", "EDMDPMSolverMultistep", "IPNDM", "SCM"])
def test_a_scheduler_whose_levels_are_not_known(name: str) -> None:
    scheduler = scheduler_of(name)
    scheduler.set_timesteps(2)
    with pytest.raises(SubjectError, match=r"use DDIM|known are"):
        level(scheduler, 0, scheduler.timesteps[0])


@pytest.mark.parametrize("kind", ["adaptive_guidance", "just_in_time", "stream_diffusion"])
def test_what_goes_by_levels_says_so_before_a_call(kind: str) -> None:
    pipe = tiny("dit", scheduler="EDMEulerScheduler")
    with pytest.raises(SubjectError, match=rf"{kind}.* goes by noise levels. EDMEulerScheduler"):
        hasten.apply(pipe, kind)
    for name in ("DDIM", "DDPM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "LCM", "TCD"):
        check_levels(scheduler_of(name, **TABLE), kind)  # before it has made any timesteps
    for name, settings in FLOWS:
        check_levels(scheduler_of(name, **settings), kind)
    assert hasten.apply(pipe, "adaptive_guidance(compare_as=output)").plan


def test_a_prediction_that_is_not_known() -> None:
    scheduler = scheduler_of("DDIM")
    scheduler.register_to_config(prediction_type="guess")
    with pytest.raises(SubjectError, match="predicts 'guess'; known are epsilon"):
        level(scheduler, 0, 0)
