"""Bottleneck Sampling: the grids of its stages, its switches, and what the small stage costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import hasten
from hasten.denoise.coding import Coder
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.run import Run
from hasten.denoise.state.bottleneck_sampling import BottleneckSampling, stage_grid
from hasten.denoise.state.sizes import Size, resize
from hasten.errors import HastenError, PlanError, SubjectError
from hasten.zoo.scenes.caption import prompts
from hasten.zoo.scenes.render import render
from tests import pipelines
from tests.pipelines import picture, tiny
from tests.techniques import drawn
from tests.techniques.denoising import block_list, recording

STEPS = 8
PLAIN = "bottleneck_sampling(scale=1.0, enter_small=0, enter_full=0, shift_small=1, switch=implied)"
FAMILIES = ("flux", "cogview4", "unet", "pixart", "wan", "cogvideox", "ltx")


def call(family: str, **more: Any) -> dict[str, Any]:
    return pipelines.call(family, **({"num_inference_steps": STEPS} | more))


def traced(pipe: Any, plan: str, family: str, **more: Any) -> tuple[Tensor, Run, DenoiseModel]:
    with hasten.apply(pipe, plan) as fast:
        run = fast.start()
        run.trace = []
        made = picture(fast._execute(run, **call(family, **more)))
    return made, run, fast


# ------------------------------------------------------------------------------------------ grids
CURVE = np.linspace(1.0, 0.0, 21)


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("start", [1.0, 0.8, 0.33])
def test_a_stages_grid_falls_from_its_start_to_zero(start: float, shift: float) -> None:
    grid = stage_grid(CURVE, start, 12, shift)
    assert len(grid) == 13 and grid[0] == start and grid[-1] == 0.0
    assert bool((np.diff(grid) < 0).all())
    # Back through h it is even steps, where the curve itself is even.
    back = grid / (shift - (shift - 1.0) * grid)
    assert np.abs(np.diff(back, 2)).max() < 0.01
    if shift > 1.0:  # a higher h spends more of the steps on noise
        assert grid[6] > stage_grid(CURVE, start, 12, 1.0)[6]


def test_all_stages_together() -> None:
    technique = BottleneckSampling()
    levels = technique.levels(CURVE, [0, 2, 15])
    assert len(levels) == 20
    np.testing.assert_allclose(levels[:2], CURVE[:2])
    assert levels[2] == pytest.approx(0.9)  # the first stage ended there, above 0.8
    assert levels[15] == pytest.approx(max(0.5, levels[15]))
    for start, end in ((0, 2), (2, 15), (15, 20)):
        assert bool((np.diff(levels[start:end]) < 0).all())
    entered = BottleneckSampling(first=0.3).levels(CURVE, [0, 6, 15])
    assert entered[6] == 0.8 > entered[5]  # noisier than the first stage's end
    plain = BottleneckSampling(
        enter_small=0.0, enter_full=0.0, shift_small=1.0, shift_last=1.0
    ).levels(CURVE, [0, 6, 15])
    assert np.array_equal(plain, CURVE[:-1])


# --------------------------------------------------------------------------------------- resizing
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 4, 16, 16), (2, 64, 12)])
def test_resizing_keeps_constants_and_averages_down(shape: tuple[int, ...]) -> None:
    frames = shape[2] if len(shape) == 5 else 1
    packed = 2 if len(shape) == 3 else 0
    full = Size((frames, 8, 8), (2, 2), packed)
    small = full.scaled(0.5)
    assert small.grid == (frames, 4, 4)
    x = torch.full(shape, 0.3)
    low = resize(x, full, small)
    assert low.shape == small.shape(x)
    torch.testing.assert_close(low, torch.full(low.shape, 0.3))
    torch.testing.assert_close(resize(low, small, full), x)
    noise = torch.randn(64, *shape[1:], generator=torch.Generator().manual_seed(0))
    # A mean of pixels has less variance: this is why the noisy sample is not what is resized.
    assert float(resize(noise, full, small).var()) < 0.5


def test_a_packed_sample_is_resized_as_the_picture_that_it_holds() -> None:
    pipe = tiny("flux")
    picture_ = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    packed = pipe._pack_latents(picture_, 2, 4, 16, 16)
    full, small = Size((1, 8, 8), (1, 1), 2), Size((1, 4, 4), (1, 1), 2)
    low = resize(packed, full, small)
    expected = resize(picture_, Size((1, 8, 8), (2, 2)), Size((1, 4, 4), (2, 2)))
    assert torch.equal(low, pipe._pack_latents(expected, 2, 4, 8, 8))


# ------------------------------------------------------------------------------------- in the loop
@pytest.mark.parametrize("family", FAMILIES)
def test_with_nothing_changed_it_is_the_plain_sampler(family: str) -> None:
    plain = picture(tiny(family)(**call(family)))
    made, _, fast = traced(tiny(family), PLAIN, family)
    assert torch.equal(made, plain)
    assert not any(key.startswith("bottleneck") for key in fast.activity)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_middle_runs_on_a_quarter_of_the_values(family: str) -> None:
    plain = picture(tiny(family)(**call(family)))
    made, run, fast = traced(tiny(family), "bottleneck_sampling", family)
    assert made.shape == plain.shape and bool(made.isfinite().all())
    assert run.trace is not None
    sizes = [step.sample[0].numel() for step in run.trace]
    full = sizes[0]
    assert sizes == [full] + [full // 4] * 5 + [full] * 2
    assert fast.activity["bottleneck_sampling.small_steps"] == 5
    assert fast.activity["bottleneck_sampling.switches"] == 2
    again, _, _ = traced(tiny(family), "bottleneck_sampling", family)
    assert torch.equal(made, again)


BEGUN = ("sd3_img2img", "flux_img2img", "unet_img2img", "sdxl_img2img")


@pytest.mark.parametrize("family", BEGUN)
def test_a_way_that_begins_with_a_picture_has_all_stages_too(family: str) -> None:
    """Nine of twelve steps are made; the stages are laid over those, and no noise is above theirs."""
    plain = picture(tiny(family)(**call(family, num_inference_steps=12)))
    made, _, fast = traced(tiny(family), PLAIN, family, num_inference_steps=12)
    assert torch.equal(made, plain) and fast.activity["steps"] == 9
    made, run, fast = traced(tiny(family), "bottleneck_sampling", family, num_inference_steps=12)
    assert made.shape == plain.shape and bool(made.isfinite().all())
    assert run.trace is not None and run.first == 3
    full = run.trace[0].sample[0].numel()
    sizes = [step.sample[0].numel() for step in run.trace]
    assert sizes == [full] + [full // 4] * 6 + [full] * 2
    noise = [run.level(step).sigma for step in run.trace]
    assert max(noise) == noise[0]


def test_a_way_that_begins_where_it_does_not_say_is_refused() -> None:
    """SDXL's pipelines may be told to begin at a share of the training steps."""
    more = {"num_inference_steps": 12, "denoising_start": 0.6}
    with pytest.raises(HastenError, match="leaves out 9; say with strength alone") as caught:
        traced(tiny("sdxl_img2img"), "bottleneck_sampling", "sdxl_img2img", **more)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["sd3", "flux", "cogview4", "unet"])
def test_a_small_step_is_the_network_at_that_size(family: str) -> None:
    """Positions too are those of the small size: the network is called by hand for it."""
    pipe = tiny(family)
    network = getattr(pipe, "transformer", None) or pipe.unet
    noted: list[tuple[dict[str, Any], Tensor]] = []
    handle = network.register_forward_hook(
        lambda m, args, kwargs, out: noted.append((kwargs | {"args": args}, out[0])),
        with_kwargs=True,
    )
    _, _run, fast = traced(pipe, "bottleneck_sampling", family)
    handle.remove()
    calls = int(fast.activity["calls"]) // STEPS
    given, output = noted[3 * calls]
    given = dict(given)
    args = given.pop("args")
    if "img_ids" in given:
        given["img_ids"] = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32)
    with torch.no_grad():
        by_hand = network(*args, **given)[0]
    assert by_hand.shape == output.shape
    torch.testing.assert_close(output, by_hand, atol=1e-5, rtol=0)


def test_the_clean_estimate_is_resized_and_noised_to_the_next_level() -> None:
    made = {}
    for switch in ("fresh", "none"):
        _, run, _ = traced(tiny("sd3"), f"bottleneck_sampling(switch={switch})", "sd3")
        made[switch] = run
    run = made["none"]
    assert run.trace is not None
    full, small = Size((1, 8, 8), (2, 2)), Size((1, 4, 4), (2, 2))
    for index, old, new in ((0, full, small), (5, small, full)):
        step = run.trace[index]
        sigma, after = (float(run.scheduler.sigmas[i]) for i in (index, index + 1))
        clean = resize(step.sample - sigma * step.output, old, new)
        torch.testing.assert_close(step.result, (1 - after) * clean)
        if index == 0:
            fresh = made["fresh"]
            assert fresh.trace is not None
            noise = (fresh.trace[0].result - (1 - after) * clean) / after
            assert abs(float(noise.mean())) < 0.4 and 0.5 < float(noise.var()) < 1.6


def test_a_sample_after_a_switch_has_a_real_ones_variance() -> None:
    """Many samples of white pictures at once, for a step that has no network behind it."""
    from hasten.denoise.run import Slots, Step
    from hasten.denoise.state.bottleneck_sampling import Progress

    pipe = tiny("sd3")
    pipe.scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    full, small = Size((1, 32, 32), (2, 2)), Size((1, 16, 16), (2, 2))
    clean, noise = (torch.randn(32, 4, 64, 64, generator=generator) for _ in range(2))
    found = {}
    for switch in ("fresh", "noisy"):
        technique = BottleneckSampling(switch=switch)
        run = Run(pipe, Slots(state=(technique, None)))
        run.num_steps = 20
        state = Progress([0, 2, 15], torch.Generator().manual_seed(1), (full, small))
        sigma, after = float(pipe.scheduler.sigmas[1]), float(pipe.scheduler.sigmas[2])
        sample = (1 - sigma) * clean + sigma * noise
        step = Step(1, pipe.scheduler.timesteps[1], noise - clean, sample, True)
        solved = (1 - after) * clean + after * noise
        result = technique.advance(state, run, step, lambda solved=solved: solved)
        real = (1 - after) * resize(clean, full, small)
        real = real + after * torch.randn(real.shape, generator=generator)
        found[switch] = float(result.var() / real.var())
    assert abs(found["fresh"] - 1.0) < 0.02
    assert found["noisy"] < 0.5  # by about the area's factor


def test_attention_saves_with_the_square_of_the_tokens() -> None:
    pipe, family = tiny("dit"), "dit"

    def flops(plan: str) -> dict[str, int]:
        with hasten.apply(pipe, plan) as fast, FlopCounterMode(display=False) as counter:
            fast(**call(family))
        totals = counter.get_flop_counts()["Global"]
        return {
            "attention": sum(n for op, n in totals.items() if "attention" in str(op)),
            "all": sum(totals.values()),
        }

    big, small = flops(PLAIN), flops("bottleneck_sampling")
    expected = 3 / 8 + 5 / 8 / 16  # 5 of 8 steps at a sixteenth of the attention
    assert small["attention"] == pytest.approx(expected * big["attention"], rel=0.01)
    assert small["all"] < big["all"]


# --------------------------------------------------------------------------------------- the rest
def test_states_of_others_begin_anew_at_a_switch() -> None:
    made, _, fast = traced(
        tiny("sd3"), "bottleneck_sampling, adaptive_guidance(threshold=-1.0)", "sd3"
    )
    assert bool(made.isfinite().all()) and fast.activity["rows"] == STEPS + 1


@pytest.mark.parametrize(
    ("plan", "fresh"),
    [("zeus", 2), ("easy_cache(threshold=1e9)", 2), ("sada", 3), ("reuse_always(interval=3)", 1)],
)
def test_gates_begin_anew_at_a_switch(plan: str, fresh: int) -> None:
    """Nothing of another size is taken for an output: so many steps of each size run first."""
    made, run, _ = traced(
        tiny("sd3"), f"bottleneck_sampling, {plan}", "sd3", num_inference_steps=30
    )
    ran = [step.ran for step in run.trace or ()]
    starts = run.state(run.slots.state).starts
    assert bool(made.isfinite().all()) and len(starts) == 3 and not all(ran)
    assert all(all(ran[start : start + fresh]) for start in starts)


def test_what_blocks_added_is_of_one_size() -> None:
    pipe = tiny("sd3")
    last = block_list(pipe)[-1]
    with recording([last.ff]) as seen:
        plan = "bottleneck_sampling, delta_dit(interval=50, share=1.0)"
        traced(pipe, plan, "sd3", num_inference_steps=20)
    sizes = [one.args[0].shape[1] for one in seen.of(last.ff)]
    assert len(sizes) == 3 and sizes[0] == sizes[2] > sizes[1]  # one full step of each size


@pytest.mark.parametrize("switch", ["implied", "none", "noisy"])
def test_ablations_are_other_pictures(switch: str) -> None:
    made, _, _ = traced(tiny("sd3"), "bottleneck_sampling", "sd3")
    other, _, _ = traced(tiny("sd3"), f"bottleneck_sampling(switch={switch})", "sd3")
    assert bool(other.isfinite().all()) and not torch.equal(made, other)


def test_batches_and_bfloat16() -> None:
    prompts = {"prompt": ["a red circle", "zzz"], "negative_prompt": ["x", "y"]}
    generators = [torch.Generator().manual_seed(i) for i in (1, 2)]
    both, _, _ = traced(
        tiny("cogview4"), "bottleneck_sampling", "cogview4", generator=generators, **prompts
    )
    alone, _, _ = traced(
        tiny("cogview4"),
        "bottleneck_sampling",
        "cogview4",
        generator=[torch.Generator().manual_seed(2)],
        prompt="zzz",
        negative_prompt="y",
    )
    torch.testing.assert_close(both[1:], alone, atol=1e-3, rtol=0)
    made, _, _ = traced(tiny("sd3", dtype=torch.bfloat16), "bottleneck_sampling", "sd3")
    assert bool(made.isfinite().all())


def test_what_it_cannot_run_on_is_refused() -> None:
    with (
        hasten.apply(tiny("sd3"), "bottleneck_sampling") as fast,
        pytest.raises(HastenError, match="at least 3 steps"),
    ):
        fast(**call("sd3", num_inference_steps=2))
    with (
        hasten.apply(tiny("sd3"), "bottleneck_sampling(first=0.6, last=0.6)") as fast,
        pytest.raises(HastenError, match="leave none"),
    ):
        fast(**call("sd3"))
    with (
        hasten.apply(tiny("sd3"), "bottleneck_sampling(scale=0.99)") as fast,
        pytest.raises(HastenError, match="not make fewer"),
    ):
        fast(**call("sd3"))
    inpaint = tiny("unet", kind="StableDiffusionInpaintPipeline")
    with pytest.raises(SubjectError, match="into its loop"):
        hasten.apply(inpaint, "bottleneck_sampling")
    heun = tiny("unet", scheduler="HeunDiscreteScheduler")
    with pytest.raises(SubjectError, match="cannot be given other timesteps"):
        hasten.apply(heun, "bottleneck_sampling")
    with pytest.raises(PlanError, match="schedule"):
        hasten.plan.Plan.parse("bottleneck_sampling, fewer_steps")
    with pytest.raises(PlanError, match="state"):
        hasten.plan.Plan.parse("bottleneck_sampling, just_in_time")


# --------------------------------------------------------------------------------- trained models
@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_ablations_look_less_real() -> None:
    name = "scenes-dit"
    drawn.model(name)
    made = {
        switch: drawn.draw(
            name, f"bottleneck_sampling(switch={switch})", 64, num_inference_steps=28
        ).frechet()
        for switch in ("fresh", "noisy", "none")
    }
    full = drawn.draw(name, "", 64, num_inference_steps=28).frechet()
    assert made["fresh"] < made["noisy"] and made["fresh"] < made["none"]
    assert made["fresh"] < 1.5 * full


def fine(pictures: Tensor) -> Tensor:
    """(pictures,) energy above what half of the size can hold."""
    spectrum = torch.fft.fft2(pictures.double(), norm="ortho").abs().square().mean(dim=1)
    side = pictures.shape[-1]
    high = torch.fft.fftfreq(side).abs() >= 0.25
    return spectrum[:, high[:, None] | high[None]].mean(dim=-1)


@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_the_last_stage_draws_what_small_pictures_cannot_hold() -> None:
    """Pictures of half the size, drawn in as many steps and enlarged, have no fine detail."""
    name, count, settings = "scenes-dit", 32, {"num_inference_steps": 28}
    full, ours = (drawn.draw(name, plan, count, **settings) for plan in ("", "bottleneck_sampling"))
    small = drawn.draw(name, "", count, height=32, width=32, **settings)
    large = torch.nn.functional.interpolate(small.pictures, scale_factor=2.0, mode="bicubic")
    small.pictures = large.clamp(0, 1)
    made = {"full": full, "ours": ours, "enlarged": small}
    energy = {word: float(fine(one.pictures).mean()) for word, one in made.items()}
    assert energy["enlarged"] < 0.3 * energy["full"], energy
    assert energy["ours"] > 0.35 * energy["full"], energy
    assert ours.frechet() < small.frechet()


@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_latents_may_be_resized() -> None:
    """What is resized and decoded is the resized picture: neither tinted nor blurred by much more."""
    pipe = drawn.model("scenes-dit")
    scenes = render([scene for _, scene in prompts(16, 3)], 64)
    coder = Coder(pipe)
    latents = torch.cat([coder.encode(coder.pixels(one)) for one in scenes])
    side = latents.shape[-1] // 2
    full, small = Size((1, side, side), (2, 2)), Size((1, side // 2, side // 2), (2, 2))
    found = coder.decode(resize(latents, full, small)).clamp(0, 1)
    expected = torch.nn.functional.avg_pool2d(scenes, 2)
    tint = (found.mean(dim=(2, 3)) - expected.mean(dim=(2, 3))).abs().mean()
    assert float(tint) < 0.03
    assert float((found - expected).square().mean()) < 0.01
