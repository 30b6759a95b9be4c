"""Random block reuse, a baseline: how many blocks, which ones, and what stands for them."""

from __future__ import annotations

import pytest
import torch

import hasten
from hasten.errors import SubjectError
from tests.pipelines import call, picture, tiny
from tests.techniques.denoising import block_list, made, own, recording


def test_no_share_is_the_original_bit_for_bit() -> None:
    pipe = tiny("flux")
    result, activity = made(pipe, "flux", "random_block_reuse(share=0.0)")
    assert torch.equal(result, picture(pipe(**call("flux"))))
    assert not own(activity, "random_block_reuse")


@pytest.mark.parametrize(
    ("interval", "share", "number"), [(2, 0.67, 5), (3, 0.5, 5), (2, 0.5, 4), (1000000, 1.0, 15)]
)
def test_blocks_add_what_they_added_when_they_last_ran(
    interval: int, share: float, number: int
) -> None:
    pipe = tiny("dit")
    blocks = block_list(pipe)
    plan = f"random_block_reuse(interval={interval}, share={share})"
    with recording(blocks) as seen, recording([block.ff for block in blocks]) as inner:
        _, activity = made(pipe, "dit", plan, num_inference_steps=6)
    assert activity["random_block_reuse.reused"] == number
    assert sum(len(inner.of(block.ff)) for block in blocks) == 18 - number
    if number == 15:  # all but the first step
        for block in blocks:
            first, *later = seen.of(block)
            added = first.output - first.args[0]
            assert all(torch.equal(one.output, one.args[0] + added) for one in later)


@pytest.mark.parametrize("knobs", ["interval=2, share=0.67", "interval=3, share=1.0"])
def test_as_many_as_delta_dit(knobs: str) -> None:
    pipe, more = tiny("dit"), {"num_inference_steps": 13}
    ours = made(pipe, "dit", f"random_block_reuse({knobs})", **more)[1]
    deltas = made(pipe, "dit", f"delta_dit({knobs})", **more)[1]
    assert abs(ours["random_block_reuse.reused"] - deltas["delta_dit.reused"]) <= 1


def test_the_seed_says_which() -> None:
    pipe = tiny("dit")
    plans = [f"random_block_reuse(seed={seed})" for seed in (0, 0, 1)]
    first, again, other = (made(pipe, "dit", plan, num_inference_steps=8)[0] for plan in plans)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(SubjectError, match="has no list of them"):
        hasten.apply(tiny("unet"), "random_block_reuse")
