"""Δ-DiT: what a left-out range is replaced by, in every kind of network, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.block.delta_dit import DeltaDiT
from hasten.errors import SubjectError
from tests.pipelines import call, picture, tiny
from tests.techniques.denoising import block_list, made, own, recording, with_forward

FAMILIES = ["dit", "sd3", "flux", "wan", "cogview4", "hunyuandit"]


@pytest.mark.parametrize("plan", ["delta_dit(interval=1)", "delta_dit(share=0.0)"])
@pytest.mark.parametrize("family", ["dit", "sd3"])
def test_nothing_left_out_is_the_original_bit_for_bit(family: str, plan: str) -> None:
    pipe = tiny(family)
    original = picture(pipe(**call(family)))
    result, activity = made(pipe, family, plan)
    assert torch.equal(result, original)
    assert not own(activity, "delta_dit")


def streams(block: Any, record: Any, *, given: bool) -> list[Tensor]:
    """The sample's tokens and, where the block changes them too, the text's: what it got, or gave."""
    names = ("hidden_states", "encoder_hidden_states")
    if not given:
        out = record.output
        return [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    values = [
        record.kwargs.get(n, dict(enumerate(record.args)).get(i)) for i, n in enumerate(names)
    ]
    if not isinstance(record.output, tuple):
        return values[:1]
    shapes = [None if t is None else t.shape for t in record.output]
    return values if shapes[0] == values[0].shape else values[::-1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["staged", "front"])
def test_a_left_out_range_adds_what_it_added_at_the_last_full_step(family: str, order: str) -> None:
    pipe = tiny(family)
    blocks = block_list(pipe)
    plan = f"delta_dit(interval=3, share=0.75, order={order})"
    technique = DeltaDiT(interval=3, share=0.75, order=order)
    with recording(blocks) as seen:
        made(pipe, family, plan, num_inference_steps=6)
    steps = 6
    calls = len(seen.of(blocks[0])) // steps  # network calls of a step
    for branch in range(calls):
        for step in range(steps):
            out_range = technique.left_out(technique.end(step, steps), len(blocks))
            full, now = branch + calls * (step - step % 3), branch + calls * step
            if step % 3 == 0:
                continue
            total = total_then = None
            for index in out_range:
                block = blocks[index]
                then, ours = seen.of(block)[full], seen.of(block)[now]
                gave, got = (streams(block, ours, given=g) for g in (False, True))
                gave_then, got_then = (streams(block, then, given=g) for g in (False, True))
                added = [a - b for a, b in zip(gave, got, strict=False)]
                added_then = [a - b for a, b in zip(gave_then, got_then, strict=False)]
                total = _plus(total, added)
                total_then = _plus(total_then, added_then)
                if family == "hunyuandit":  # later blocks read these, so each adds its own
                    torch.testing.assert_close(added, added_then, atol=2e-5, rtol=1e-4)
            assert total is not None and total_then is not None
            if family == "sd3" and len(blocks) - 1 in out_range:
                total, total_then = total[-1:], total_then[-1:]  # the last text is not used
            torch.testing.assert_close(total, total_then, atol=1e-4, rtol=1e-4)


def _plus(total: list[Tensor] | None, more: list[Tensor]) -> list[Tensor]:
    if total is None or [t.shape for t in total] != [t.shape for t in more]:
        return (total or [])[:0] + more
    return [a + b for a, b in zip(total, more, strict=True)]


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
    return output[0] if isinstance(output, tuple) else output.sample


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
    assert 1 / (1 - 6 * 2 / 27) == pytest.approx(DeltaDiT(interval=3, share=2 / 3).most(None))


@pytest.mark.parametrize("plan", ["delta_dit(interval=4)", "delta_dit(interval=50, share=1.0)"])
def test_blocks_that_add_constants_lose_nothing(plan: str) -> None:
    pipe = tiny("dit")
    blocks = block_list(pipe)
    width = pipe.transformer.inner_dim
    constants = torch.randn(len(blocks), width, generator=torch.Generator().manual_seed(3))
    with with_forward(blocks, lambda i, hidden, *_, **__: hidden + constants[i]):
        original = picture(pipe(**call("dit", num_inference_steps=8)))
        result, activity = made(pipe, "dit", plan, num_inference_steps=8)
    assert activity["delta_dit.reused"] > 0
    torch.testing.assert_close(result, original, atol=1e-4, rtol=0)


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
