"""PrefixKV: what the sheet says would prove it wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.causal.kv.eviction import allowance
from hasten.causal.kv.prefix_kv import PrefixKV, prefix_masses, prefix_sizes
from tests import models
from tests.techniques.caches import cache_of, called, held, states, watched
from tests.techniques.held_out import PROMPT, items, losses, subject


def sizes_of(
    received: Tensor, entries: int, *, least: int = 0, ranks: Tensor | None = None
) -> list[int]:
    """Sizes of layers that received (1, layers, length), ranked by just that."""
    ranks = received if ranks is None else ranks
    return [layer[0] for layer in prefix_sizes(received, ranks, [entries], torch.tensor([least]))]


def layers_of(*received: Tensor) -> Tensor:
    """Layers (length,) as one row (1, layers, length)."""
    return torch.stack(received)[None]


def unequal(layers: int = 5, length: int = 60, seed: int = 0) -> Tensor:
    """Scores (1, layers, length) of layers that are from nearly one-hot to nearly flat."""
    generator = torch.Generator().manual_seed(seed)
    sharpness = torch.linspace(0.2, 4.0, layers)[None, :, None]
    return (torch.randn((1, layers, length), generator=generator) * sharpness).exp()


def mass_at(masses: Tensor, sizes: list[int]) -> Tensor:
    """Mass (layers,) that prefixes of these sizes retain."""
    padded = torch.nn.functional.pad(masses[0], (1, 0))
    return padded.gather(1, torch.tensor(sizes)[:, None])[:, 0]


# ------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_all_layers_reach_the_same_mass_but_for_one_entry(share: float) -> None:
    scores = unequal()
    sizes = sizes_of(scores, int(300 * share))
    assert sum(sizes) == int(300 * share)
    masses = prefix_masses(scores, scores)
    # There is a level that all prefixes reach, and none would without its last entry.
    level = mass_at(masses, sizes).min()
    assert mass_at(masses, [size - 1 for size in sizes]).max() <= level
    # Which equal sizes do not.
    uniform = [int(60 * share)] * 5
    assert (
        mass_at(masses, [size - 1 for size in uniform]).max()
        > mass_at(masses, uniform).min() + 0.05
    )


def test_no_other_allocation_has_a_larger_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(5):
        scores = unequal(seed=seed)
        sizes = sizes_of(scores, 75)
        masses = prefix_masses(scores, scores)
        reached = mass_at(masses, sizes).min()
        for _ in range(300):
            weights = (
                torch.rand(5, generator=generator)
                if _ % 2
                else torch.tensor(sizes) + torch.randn(5)
            )
            tried = (
                (weights.clamp(min=0.1) / weights.clamp(min=0.1).sum() * 75).long().clamp(max=60)
            )
            tried[int(torch.randint(5, (1,), generator=generator))] += 75 - tried.sum()
            if tried.min() >= 0 and tried.max() <= 60:
                assert mass_at(masses, tried.tolist()).min() <= reached + 1e-12


def test_a_sharp_layer_gets_little_and_a_flat_one_much() -> None:
    sharp = torch.full((100,), 1e-6)
    sharp[17] = 1.0
    assert sizes_of(layers_of(sharp, torch.ones(100)), 60) == [1, 59]


@pytest.mark.parametrize("kind", ["random", "one-hot", "flat"])
def test_identical_layers_get_equal_sizes(kind: str) -> None:
    layer = {"random": torch.rand(50), "one-hot": torch.eye(50)[3], "flat": torch.ones(50)}[kind]
    for entries in range(2, 101):
        first, second = sizes_of(layers_of(layer, layer), entries)
        assert first + second == entries and 0 <= first - second <= 1


def test_tiny_prompts_are_exact_too() -> None:
    for length in range(1, 9):
        for layers in range(1, 5):
            scores = torch.rand(1, layers, length)
            for entries in range(layers * min(2, length), layers * length + 1):
                sizes = sizes_of(scores, entries, least=min(2, length))
                assert sum(sizes) == entries
                assert all(min(2, length) <= size <= length for size in sizes)


def test_what_stays_is_part_of_the_prefix_and_of_its_mass() -> None:
    received = torch.tensor([[[1.0, 8.0, 1.0, 6.0, 4.0]]])
    ranks = torch.tensor([[[9.0, 8.0, 1.0, 6.0, 4.0]]])
    masses = prefix_masses(received, ranks)
    torch.testing.assert_close(masses[0, 0], torch.tensor([1, 9, 15, 19, 20]).double() / 20)


def test_holes_count_nothing() -> None:
    received = unequal(layers=3, length=20)
    padded = torch.cat((torch.full((1, 3, 7), 1e9), received), dim=2)
    ranks = torch.cat((torch.full((1, 3, 7), -math.inf), received), dim=2)
    for entries in (3, 30, 60):
        assert sizes_of(padded, entries, ranks=ranks) == sizes_of(received, entries)


# ------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("length", [40, 120])
@pytest.mark.parametrize("budget", [0.15, 0.25, 0.6, 0.9])
def test_the_total_is_the_budget_and_every_layer_keeps_both_ends(
    tiny_llama, budget: float, length: int
) -> None:
    model = tiny_llama(num_hidden_layers=4)
    run = called(model, f"prefix_kv(budget={budget})", inputs=models.prompt(2, length))
    layers = run.lane.cache.layers
    for row in range(2):
        kept = [held(layer, row) for layer in layers]
        assert sum(map(len, kept)) == allowance(4 * length, budget, 4 * 5)
        for positions in kept:
            assert positions == sorted(positions) and positions[:4] == [0, 1, 2, 3]
            assert positions[-1] == length - 1


def test_each_layer_keeps_its_best_entries(tiny_llama) -> None:
    model, prompt, scores = tiny_llama(num_hidden_layers=3), models.prompt(1, 80), []
    original = PrefixKV.shrink

    def shrink(self, run, cache, given, seen):
        scores.extend(given)
        return original(self, run, cache, given, seen)

    PrefixKV.shrink = shrink
    try:
        run = called(model, "prefix_kv(score=sum)", inputs=prompt)
    finally:
        PrefixKV.shrink = original
    for layer, score in zip(run.lane.cache.layers, scores, strict=True):
        assert score.sum().item() == pytest.approx(80, rel=1e-4)  # one per query
        middle = (
            score[0, 4:75].topk(layer.length - 9).indices + 4
        )  # a quarter of twenty is the newest
        assert held(layer) == [0, 1, 2, 3, *sorted(middle.tolist()), *range(75, 80)]


def test_mean_scores_are_sums_over_the_queries_that_see_an_entry() -> None:
    cache = cache_of(torch.randn(2, 1, 50, 4), pads=torch.tensor([0, 8]))
    received = torch.rand(2, 50)
    mean = PrefixKV(recent_share=0.0).ranks(cache.layers[0], received, [50, 42])
    total = PrefixKV(recent_share=0.0, score="sum").ranks(cache.layers[0], received, [50, 42])
    assert (mean[1, 0, :8] == -math.inf).all()
    for row, pad in enumerate((0, 8)):
        middle = slice(pad + 4, 49)
        torch.testing.assert_close(total[row, 0, middle], received[row, middle])
        queries = torch.arange(50 - pad, 0, -1)[4:-1]
        torch.testing.assert_close(mean[row, 0, middle] * queries, received[row, middle])


def test_decoding_keeps_each_layers_share_and_deletes_at_its_own_fixed_place(tiny_llama) -> None:
    model, prompt, before = tiny_llama(num_hidden_layers=3), models.prompt(1, 200), []
    places: list[set[int]] = [set(), set(), set()]

    def check(state, run, cache) -> None:
        now = [held(layer) for layer in cache.layers]
        seen = int(run.lane.filled[0])
        fixed = state.fixed[cache]
        for index, (positions, share) in enumerate(zip(now, fixed.shares, strict=True)):
            assert len(positions) == max(5, math.ceil(seen * share[0] - 1e-9))
            if seen > 200:
                grown = [*before[-1][index], seen - 1]
                gone = [place for place, position in enumerate(grown) if position not in positions]
                assert len(gone) == len(grown) - len(positions) <= 1
                places[index].update(gone)
        before.append(now)

    with watched(PrefixKV, check):
        run = called(model, "prefix_kv(budget=0.4, distance=-25)", inputs=prompt, new=60)
    first = [len(positions) for positions in before[0]]
    fixed = states(run).fixed[run.lane.cache]
    assert len(set(first)) > 1  # the layers differ, so their places do
    for index, size in enumerate(first):
        wanted = size - 25 if size - 25 >= 4 else max(4, size // 2)
        assert places[index] == {wanted} == set(fixed.slots[index])
    lengths = [len(positions) for positions in before[-1]]
    assert sum(lengths) <= math.ceil(259 * 0.4) * 3 + 3


PAPERS = "prefix_kv(score=sum, recent_share=0, distance=-25)"


@pytest.mark.zoo
def test_likelihood_of_held_out_code(zoo) -> None:
    found = losses("prefix_kv", "random_eviction", PAPERS)
    assert found.surely_less("prefix_kv", "random_eviction")
    assert found.surely_less("prefix_kv", PAPERS)


@pytest.mark.zoo
@pytest.mark.parametrize("budget", [0.1, 0.25])
def test_equal_sizes_retain_less_in_the_worst_layer(zoo, monkeypatch, budget: float) -> None:
    """On held-out code: the least attention that any layer retains of the prompt."""
    retained: dict[str, Tensor] = {}
    original = PrefixKV.shrink

    def shrink(self, run, cache, received, seen):
        fixed = original(self, run, cache, received, seen)
        layers = []
        for layer, attention in zip(cache.layers, received, strict=True):
            kept = [attention[row, held(layer, row)].sum() for row in range(len(seen))]
            layers.append(torch.stack(kept) / attention.sum(dim=1))
        retained[self.allocation] = torch.stack(layers).amin(dim=0)
        return fixed

    monkeypatch.setattr(PrefixKV, "shrink", shrink)
    for allocation in ("prefix", "uniform"):
        plan = f"prefix_kv(allocation={allocation}, budget={budget})"
        called(subject().model, plan, inputs=items()[:, :PROMPT])
    assert (retained["prefix"] >= retained["uniform"] - 1e-6).all()
    assert retained["prefix"].mean() > 1.02 * retained["uniform"].mean()
