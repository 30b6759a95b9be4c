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


@pytest.mark.parametrize(("share", "number"), [(0.34, 1), (0.67, 2), (1.0, 3)])
def test_as_many_blocks_add_what_they_added_when_they_last_ran(share: float, number: int) -> None:
    pipe = tiny("dit")
    blocks = block_list(pipe)
    plan = f"random_block_reuse(share={share})"
    with recording(blocks) as seen, recording([block.ff for block in blocks]) as inner:
        _, activity = made(pipe, "dit", plan, num_inference_steps=6)
    assert activity["random_block_reuse.reused"] == 5 * number
    assert sum(len(inner.of(block.ff)) for block in blocks) == 18 - 5 * number
    if number == 3:
        for block in blocks:
            first, *later = seen.of(block)
            added = first.output - first.args[0]
            assert all(torch.equal(one.output, one.args[0] + added) for one in later)


def test_the_seed_says_which() -> None:
    pipe = tiny("dit")
    plans = [f"random_block_reuse(seed={seed})" for seed in (0, 0, 1)]
    first, again, other = (made(pipe, "dit", plan, num_inference_steps=8)[0] for plan in plans)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(SubjectError, match="has no list of them"):
        hasten.apply(tiny("unet"), "random_block_reuse")
