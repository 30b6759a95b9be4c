"""Shares of a pipeline's time and its operations, beside closed formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hasten.benchmark.calls import Picture
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.shares import count_flops, measure_shares
from hasten.plan import Plan
from hasten.subject import open_subject
from tests import pipelines

STEPS = 3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_counts_two_products(masked: bool, dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 3, 10, 8, dtype=dtype), torch.randn(2, 3, 14, 8, dtype=dtype)
    value = torch.randn(2, 3, 14, 8, dtype=dtype)
    mask = torch.zeros(2, 1, 10, 14, dtype=dtype) if masked else None
    found = count_flops(lambda: F.scaled_dot_product_attention(query, key, value, mask))
    assert found == 2 * (2 * 2 * 3 * 10 * 14 * 8)


def dit_flops(pipe: Any, rows: int) -> int:
    """Operations of one forward pass of a DiT over so many rows, from its config alone."""
    config = pipe.transformer.config
    tokens = (config.sample_size // config.patch_size) ** 2
    heads, each = config.num_attention_heads, config.attention_head_dim
    dim, patch = heads * each, config.patch_size**2
    linear = (
        4 * dim * dim + 2 * 4 * dim * dim
    )  # four projections, and a hidden layer 4 times as wide
    attention = 2 * tokens * dim  # of one token: its scores, and the mean of the values
    # The time's embedding (256 wide) and the six scales and shifts are made once a row.
    modulation = 256 * dim + dim * dim + dim * 6 * dim
    blocks = config.num_layers * (tokens * (linear + attention) + modulation)
    ends = tokens * dim * patch * (config.in_channels + config.out_channels)
    last = 256 * dim + dim * dim + dim * 2 * dim  # the first block's embedding again
    return 2 * rows * (blocks + ends + last)


def test_a_dit_counts_what_the_formula_says() -> None:
    pipe = pipelines.tiny("dit")
    arguments = {"class_labels": [3], "num_inference_steps": STEPS, "guidance_scale": 3.0}
    subject = open_subject(pipe)
    model = DenoiseModel(subject, Plan(()), exclusive=False)
    picture = Picture(arguments, seed=0)
    found = measure_shares(model, picture.call)
    with torch.no_grad():
        x = torch.zeros(1, 4, 8, 8)
        decoding = count_flops(lambda: pipe.vae.decode(x))
        once = count_flops(lambda: pipe.transformer(x, torch.zeros(1), torch.zeros(1).long()))
    assert once == dit_flops(pipe, rows=1)
    assert found.flops == STEPS * dit_flops(pipe, rows=2) + decoding  # two rows: guidance
    assert found.num_calls == STEPS
    assert 0 < found.attention < found.blocks < found.calls <= 1
    assert found.guidance == found.calls / 2


def test_convolutions_are_counted_too() -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1)
    found = count_flops(lambda: layer(torch.zeros(2, 3, 8, 8)))
    assert found == 2 * 2 * 5 * 8 * 8 * 3 * 9
