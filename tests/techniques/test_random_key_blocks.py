"""Random key blocks, a baseline: how many cells are read, and which."""

from __future__ import annotations

import pytest
import torch

from hasten.denoise.attention.grat import Grat
from hasten.denoise.attention.random_key_blocks import RandomKeyBlocks
from hasten.denoise.attention.sparse import Cells
from tests.pipelines import call, picture, tiny
from tests.techniques.attending import CPU
from tests.techniques.denoising import made, own

LARGE = {"height": 32, "width": 32}


@pytest.mark.parametrize("pattern", ["criss_cross", "surrounding"])
def test_as_many_cells_are_read_as_by_grat(pattern: str) -> None:
    places = Cells.of((1, 24, 24), (1, 4, 4), CPU).places
    ours = RandomKeyBlocks(pattern=pattern).seen(places)
    grat = Grat(pattern=pattern).seen(places)
    assert torch.equal(ours.sum(dim=1), grat.sum(dim=1)) and not torch.equal(ours, grat)
    assert torch.equal(ours, RandomKeyBlocks(pattern=pattern).seen(places))
    assert not torch.equal(ours, RandomKeyBlocks(pattern=pattern, seed=1).seen(places))


def test_a_share_of_the_cells() -> None:
    places = Cells.of((2, 8, 8), (1, 2, 2), CPU).places
    assert RandomKeyBlocks(density=0.25).seen(places).sum(dim=1).tolist() == [8] * 32


def test_all_of_them_is_the_original_bit_for_bit() -> None:
    pipe = tiny("pixart")
    result, activity = made(pipe, "pixart", "random_key_blocks(density=1.0, cell=2)", **LARGE)
    assert torch.equal(result, picture(pipe(**call("pixart", **LARGE))))
    assert not own(activity, "random_key_blocks")


def test_the_same_work_as_grat_in_a_pipeline() -> None:
    pipe = tiny("pixart")
    ours = made(pipe, "pixart", "random_key_blocks(cell=2)", **LARGE)[1]
    grat = made(pipe, "pixart", "grat(cell=2)", **LARGE)[1]
    assert ours["random_key_blocks.pairs"] == grat["grat.pairs"]
