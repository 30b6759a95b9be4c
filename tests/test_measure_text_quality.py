"""Text metrics on figures that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hasten.measure.text_quality import (
    agreement,
    bits_per_byte,
    kl_divergence,
    perplexity,
)


def test_bits_per_byte() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="one byte"):
        bits_per_byte(1.0, 0)


def test_perplexity() -> None:
    assert perplexity([math.log(4)] * 3) == pytest.approx(4.0)
    assert perplexity(torch.tensor([0.0, 2 * math.log(3)])) == pytest.approx(3.0)
    assert perplexity([1e6]) == math.inf
    with pytest.raises(ValueError, match="one token"):
        perplexity([])


def test_kl_divergence() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = kl_divergence(p, q + 3.0)  # logits have no fixed offset
    assert found.shape == (2,)
    assert found[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(found[1]) == pytest.approx(0.0, abs=1e-15)  # the offset rounds
    assert kl_divergence(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5)).shape == (2, 3)
    with pytest.raises(ValueError, match="shapes differ"):
        kl_divergence(torch.zeros(2, 3), torch.zeros(2, 4))


def test_kl_of_masked_logits() -> None:
    p = torch.tensor([0.0, -math.inf, 0.0])
    q = torch.tensor([0.0, 0.0, 0.0])
    assert float(kl_divergence(p, q)) == pytest.approx(math.log(3 / 2))
    assert float(kl_divergence(q, p)) == math.inf
    assert float(kl_divergence(p, p)) == 0.0


def test_kl_of_nearly_equal_half_precision() -> None:
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = kl_divergence(logits, logits * (1 + 1e-2))
    assert (found >= 0).all() and found.mean() < 1e-2


def test_agreement_of_equal_sequences() -> None:
    found = agreement([1, 2, 3], torch.tensor([1, 2, 3]))
    assert found.identical and found.share == 1.0 and found.first_divergence is None


def test_a_prefix_is_not_identical() -> None:
    found = agreement([1, 2, 3], [1, 2, 3, 4])
    assert not found.identical
    assert found.share == 0.75
    assert found.first_divergence == 3
    assert (found.length_a, found.length_b) == (3, 4)
    assert agreement([1, 2, 3, 4], [1, 2, 3]).first_divergence == 3
    assert not agreement([], [1]).identical
    assert agreement([], [1]).share == 0.0
    assert agreement([], []).identical


def test_first_divergence_is_the_first() -> None:
    found = agreement([5, 1, 2, 9], [5, 7, 2, 8])
    assert (found.first_divergence, found.share) == (1, 0.5)
    with pytest.raises(ValueError, match="not a batch"):
        agreement(torch.zeros(2, 3, dtype=torch.long), [0])
