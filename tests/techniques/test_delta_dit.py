"""Δ-DiT: what a left-out range is replaced by, in every kind of network, and when."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.block.delta_dit import DeltaDiT
from hasten.denoise.blocks import BlockCall
from hasten.errors import SubjectError
from hasten.measure.image_quality import psnr
from tests.pipelines import call, picture, tiny
from tests.techniques.denoising import (
    Pass,
    block_list,
    db,
    made,
    own,
    recording,
    with_forward,
    zoo_sample,
)
from tests.techniques.drawn import draw

FAMILIES = ["dit", "sd3", "flux", "wan", "cogview4", "hunyuandit"]


@pytest.mark.parametrize("plan", ["delta_dit(interval=1)", "delta_dit(share=0.0)"])
@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_nothing_left_out_is_the_original_bit_for_bit(family: str, plan: str) -> None:
    pipe = tiny(family)
    original = picture(pipe(**call(family)))
    result, activity = made(pipe, family, plan)
    assert torch.equal(result, original)
    assert not own(activity, "delta_dit")


def added(block: Any, record: Pass) -> list[Tensor]:
    """What a block added to the sample's tokens and, where it changes them too, to the text's."""
    call = BlockCall(0, 1, block, record.args, record.kwargs, 0, block)
    hidden, text = call.parts(record.output)
    pairs = [(hidden, call.hidden)]
    if text is not None and call.text is not None:
        pairs.append((text, call.text))
    return [after - before for after, before in pairs]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["staged", "front"])
def test_a_left_out_range_adds_what_it_added_at_the_last_full_step(family: str, order: str) -> None:
    pipe, steps = tiny(family), 6
    blocks = block_list(pipe)
    plan = f"delta_dit(interval=3, share=0.75, order={order})"
    technique = DeltaDiT(interval=3, share=0.75, order=order)
    with recording(blocks) as seen:
        made(pipe, family, plan, num_inference_steps=steps)
    calls = len(seen.of(blocks[0])) // steps  # network calls of a step
    for call_of_step, step in product(range(calls), (1, 2, 4, 5)):
        left_out = technique.left_out(technique.end(step, steps), len(blocks))
        now, full = (call_of_step + calls * s for s in (step, step - step % 3))
        sums: list[tuple[Tensor, Tensor]] = []
        for index in left_out:
            ours, then = (added(blocks[index], seen.of(blocks[index])[n]) for n in (now, full))
            pairs = list(zip(ours, then, strict=False))
            if family == "hunyuandit":  # later blocks read these, so each adds its own
                torch.testing.assert_close(ours, then, atol=2e-5, rtol=1e-4)
            if sums and pairs[0][0].shape == sums[0][0].shape:  # some last blocks leave the text
                both = zip(pairs, sums, strict=False)
                pairs = [(a + c, b + d) for (a, b), (c, d) in both]
            sums = pairs
        assert sums
        for ours_in_all, then_in_all in sums:
            torch.testing.assert_close(ours_in_all, then_in_all, atol=1e-4, rtol=1e-4)


def test_the_output_of_a_range_is_input_plus_delta_to_the_bit() -> None:
    pipe = tiny("dit")
    blocks = block_list(pipe)
    with recording(blocks) as seen:
        made(pipe, "dit", "delta_dit(interval=2, share=1.0)", num_inference_steps=6)
    first, last = seen.of(blocks[0]), seen.of(blocks[-1])
    for step in range(1, 6, 2):  # the whole stack: as a cache of the network's residual
        delta = last[step - 1].output - first[step - 1].args[0]
        assert torch.equal(last[step].output, first[step].args[0] + delta)


@pytest.mark.parametrize("family", ["dit", "flux"])
def test_full_steps_and_the_blocks_outside_are_the_networks_own(family: str) -> None:
    pipe = tiny(family)
    blocks = block_list(pipe)
    with recording([pipe.transformer, *blocks]) as seen:
        made(pipe, family, "delta_dit(interval=2, share=0.5)", num_inference_steps=6)
    for step, one in enumerate(seen.of(pipe.transformer)):
        same = torch.equal(_tensor(pipe.transformer(*one.args, **one.kwargs)), _tensor(one.output))
        assert same == (step % 2 == 0)
    technique = DeltaDiT(interval=2, share=0.5)
    for step in (1, 3, 5):
        left_out = technique.left_out(technique.end(step, 6), len(blocks))
        for index, block in enumerate(blocks):
            one = seen.of(block)[step]
            again = block(*one.args, **one.kwargs)
            same = torch.equal(_last(again), _last(one.output))
            assert same == (index not in left_out)


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output["sample"]


def _last(output: Any) -> Tensor:
    return output[-1] if isinstance(output, tuple) else output


def test_rear_blocks_early_and_front_blocks_late() -> None:
    staged, reversed_ = DeltaDiT(), DeltaDiT(order="reversed")
    assert [staged.end(step, 20) for step in (0, 9, 10, 19)] == ["rear", "rear", "front", "front"]
    assert [reversed_.end(step, 20) for step in (0, 9, 10, 19)] == [
        "front",
        "front",
        "rear",
        "rear",
    ]
    assert staged.left_out("rear", 28) == range(7, 28) and staged.left_out("front", 28) == range(21)
    assert DeltaDiT(switch=0.6).end(11, 20) == "rear"


def test_work_falls_by_the_formula_and_blocks_really_do_not_run() -> None:
    pipe = tiny("dit")
    blocks = block_list(pipe)
    with recording([block.ff for block in blocks]) as seen:
        _, activity = made(pipe, "dit", "delta_dit(interval=3, share=0.67)", num_inference_steps=9)
    ran = sum(len(seen.of(block.ff)) for block in blocks)
    assert activity["delta_dit.reused"] == 9 * 3 - ran == 6 * 2
    assert DeltaDiT().most(None) == pytest.approx(1.6)  # the paper's, with 21 of 28 blocks
    few = DeltaDiT(share=6 / 28).most(None)  # and with 6 of them, for four steps
    assert few == pytest.approx(1.12, abs=0.005)
    assert DeltaDiT(interval=3, share=2 / 3).most(None) == pytest.approx(27 / ran)


@pytest.mark.parametrize("knobs", ["interval=4", "interval=50, share=1.0"])
def test_blocks_that_add_constants_lose_nothing(knobs: str) -> None:
    pipe, more = tiny("dit"), {"num_inference_steps": 8}
    blocks = block_list(pipe)
    width = pipe.transformer.inner_dim
    constants = torch.randn(len(blocks), width, generator=torch.Generator().manual_seed(3))
    with with_forward(blocks, lambda i, hidden, *_, **__: hidden + constants[i]):
        original = picture(pipe(**call("dit", **more)))
        result, activity = made(pipe, "dit", f"delta_dit({knobs})", **more)
        outputs, _ = made(pipe, "dit", f"delta_dit({knobs}, order=front, keep=output)", **more)
    assert activity["delta_dit.reused"] > 0
    torch.testing.assert_close(result, original, atol=1e-4, rtol=0)
    assert db(outputs, original) < 25.0  # nothing of the new sample came past the range


def test_outputs_instead_of_deltas_freeze_what_the_rear_blocks_get() -> None:
    pipe = tiny("dit")
    blocks = block_list(pipe)
    inputs = {}
    for keep in ("delta", "output"):
        with recording(blocks) as seen:
            made(
                pipe,
                "dit",
                f"delta_dit(interval=2, share=0.67, order=front, keep={keep})",
                num_inference_steps=4,
            )
        inputs[keep] = [one.args[0] for one in seen.of(blocks[-1])]
    for step in (1, 3):
        assert torch.equal(inputs["output"][step], inputs["output"][step - 1])
        assert not torch.equal(inputs["delta"][step], inputs["delta"][step - 1])


@pytest.mark.parametrize("family", ["cogview4", "sd3"])  # guidance in two calls, and in one
def test_a_second_call_is_the_first_one_again(family: str) -> None:
    pipe = tiny(family)
    with hasten.apply(pipe, "delta_dit") as fast:
        first = picture(fast(**call(family)))
        assert torch.equal(picture(fast(**call(family))), first)
        other = picture(fast(**call(family, prompt="another", height=32, width=32)))
        assert torch.isfinite(other).all()
        assert torch.equal(picture(fast(**call(family))), first)


def test_rows_of_a_batch_do_not_hear_of_each_other() -> None:
    pipe = tiny("dit")
    labels = [3, 8]
    noise = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both, _ = made(pipe, "dit", "delta_dit", class_labels=labels, generator=noise)
    for row, (label, seed) in enumerate(zip(labels, (5, 6), strict=True)):
        one, _ = made(pipe, "dit", "delta_dit", class_labels=[label], seed=seed)
        torch.testing.assert_close(both[row : row + 1], one, atol=1e-4, rtol=0)


def test_rows_left_out_by_a_guider_are_left_out_of_what_was_kept() -> None:
    pipe = tiny("dit")
    cut = "adaptive_guidance(threshold=-1.0)"  # guides for as few steps as it may
    with recording([pipe.transformer]) as seen:
        result, activity = made(pipe, "dit", cut, "delta_dit(interval=3)", num_inference_steps=8)
    assert activity["left_out"] > 0 and activity["delta_dit.reused"] > 0
    assert torch.isfinite(result).all() and len(seen.of(pipe.transformer)) == 8
    alone, _ = made(pipe, "dit", cut, num_inference_steps=8)
    assert not torch.equal(result, alone)


@pytest.mark.parametrize("gate", ["reuse_always(interval=2)", "zeus"])
def test_full_steps_are_calls_that_run_where_others_are_dropped(gate: str) -> None:
    """Every second call that runs is a full one, whichever steps a gate leaves to it."""
    pipe, steps = tiny("dit"), 24
    first, *_, last = block_list(pipe)
    with recording([pipe.transformer, first.ff, last.ff]) as seen:
        _, activity = made(pipe, "dit", gate, "delta_dit(share=0.67)", num_inference_steps=steps)
    calls = activity["calls"]
    assert activity["skipped"] == steps - calls > 5
    # Both ends of the network run at full calls only; at the switch one more may be full.
    full = len(seen.of(first.ff)) + len(seen.of(last.ff)) - calls
    assert full in (-(-calls // 2), -(-calls // 2) + 1)
    assert activity["delta_dit.reused"] == 2 * (calls - full)


def test_a_second_network_begins_anew() -> None:
    pipe = tiny("wan")
    pipe.register_modules(transformer_2=tiny("wan").transformer)
    pipe.register_to_config(boundary_ratio=0.9)
    blocks = block_list(pipe)
    later = list(pipe.transformer_2.blocks)
    with recording([blocks[0].ffn, later[0].ffn, later[-1].ffn]) as seen:
        plan = "delta_dit(interval=50, share=1.0)"
        made(pipe, "wan", plan, num_inference_steps=8, prompt_embeds=None)
    assert len(seen.of(blocks[0].ffn)) == len(seen.of(later[0].ffn)) == 2  # its first step, twice
    assert len(seen.of(later[-1].ffn)) == 2


def test_bfloat16() -> None:
    pipe = tiny("dit", dtype=torch.bfloat16)
    original = picture(pipe(**call("dit")))
    neutral, _ = made(pipe, "dit", "delta_dit(interval=1)")
    result, activity = made(pipe, "dit", "delta_dit")
    assert torch.equal(neutral, original) and activity["delta_dit.reused"] > 0
    assert torch.isfinite(result).all()


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(SubjectError, match="UNet2DConditionModel has no list of them"):
        hasten.apply(tiny("unet"), "delta_dit")


# --------------------------------------------------------------------------------------- the zoo
@pytest.mark.zoo
@pytest.mark.thorough
@pytest.mark.parametrize("share", [0.13, 0.38])
def test_on_a_trained_model_deltas_beat_outputs(share: float) -> None:
    """What the front put out is frozen, so that nothing new reaches the rear; what it added is not.

    By more than two standard errors. With most of the blocks left out both score alike: what those add
    is larger than what they are given, and changes as much.
    """
    settings = {"num_inference_steps": 20, "guidance_scale": 4.0}
    original, near = draw("scenes-dit", "", 24, **settings), {}
    for keep in ("delta", "output"):
        plan = f"delta_dit(order=front, share={share}, keep={keep})"
        near[keep] = psnr(draw("scenes-dit", plan, 24, **settings).array, original.array)
    gain = near["delta"] - near["output"]
    assert gain.mean() > 2 * gain.std(ddof=1) / len(gain) ** 0.5, (gain.mean(), gain.std())


@pytest.mark.zoo
@pytest.mark.thorough
def test_ranges_beat_as_many_random_blocks() -> None:
    original, _ = zoo_sample("scenes-dit")
    ours, activity = zoo_sample("scenes-dit", "delta_dit")
    random, as_many = zoo_sample("scenes-dit", "random_block_reuse")
    assert activity["delta_dit.reused"] == pytest.approx(
        as_many["random_block_reuse.reused"], rel=0.1
    )
    assert db(ours, original) > db(random, original)


@pytest.mark.zoo
@pytest.mark.thorough
def test_which_end_is_left_out_late_hardly_matters() -> None:
    """And which early makes another picture, but none that is nearer to the full run's for sure.

    So here the paper's order is no worse than the others, and no better.
    """
    count, settings = 24, {"num_inference_steps": 20, "guidance_scale": 4.0}
    original = draw("scenes-dit", "", count, **settings)
    near = {}
    for order in ("staged", "reversed", "front", "rear"):
        ours = draw("scenes-dit", f"delta_dit(order={order}, share=0.38)", count, **settings)
        near[order] = psnr(ours.array, original.array)
    assert abs(near["staged"] - near["rear"]).mean() < 0.5
    assert abs(near["reversed"] - near["front"]).mean() < 0.5
    loss = near["reversed"] - near["staged"]
    assert loss.mean() < 3 * loss.std(ddof=1) / count**0.5


def bands(error: Any) -> tuple[float, float]:
    """Mean squares of what is left of an error by a blur, and of what the blur takes away."""
    pictures = torch.from_numpy(error).movedim(-1, 1)
    low = torch.nn.functional.avg_pool2d(pictures, 8)
    smooth = torch.nn.functional.interpolate(low, scale_factor=8, mode="nearest")
    return float(smooth.square().mean()), float((pictures - smooth).square().mean())


@pytest.mark.zoo
@pytest.mark.thorough
def test_what_each_end_draws_by_band_and_half_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of the blocks is left out in one half of the steps only, and the error split by a blur.

    On this model the early half is where blocks matter, whichever end they are of and in either band;
    there is no more to the paper's split into outlines and details than that. See also above.
    """
    settings = {"num_inference_steps": 20, "guidance_scale": 4.0}
    original = draw("scenes-dit", "", 12, **settings)
    error: dict[tuple[str, str], tuple[float, float]] = {}
    begin = DeltaDiT._begin_call
    for part, kept in (("early", range(10)), ("late", range(10, 20))):

        def full_elsewhere(
            self: DeltaDiT, state: Any, run: Any, call: Any, kept: range = kept
        ) -> None:
            begin(self, state, run, call)
            if run.index not in kept:
                state.full, state.since = True, 1
                state.ends = (self.end(run.index, run.num_steps),)

        with monkeypatch.context() as patch:
            patch.setattr(DeltaDiT, "_begin_call", full_elsewhere)
            for end in ("front", "rear"):
                ours = draw("scenes-dit", f"delta_dit(order={end}, share=0.34)", 12, **settings)
                error[part, end] = bands(ours.array - original.array)
    for end in ("front", "rear"):
        for band in (0, 1):
            assert error["early", end][band] > error["late", end][band], error
