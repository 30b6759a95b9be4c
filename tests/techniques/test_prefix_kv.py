"""PrefixKV: what the sheet says would prove it wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.causal.kv.eviction import allowance
from hasten.causal.kv.prefix_kv import PrefixKV, prefix_masses, prefix_sizes
from tests import models
from tests.techniques.caches import called, held, states, watched

NO_HOLES = torch.zeros((1, 1), dtype=torch.bool)


def layers_of(*scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (length,) of some layers as `prefix_sizes` takes them, with nothing that must stay."""
    stacked = torch.stack(scores)[None]
    nothing = torch.zeros((1, stacked.shape[2]), dtype=torch.bool)
    return stacked, nothing, nothing


def sizes_of(scores: Tensor, entries: int, stays: Tensor, absent: Tensor) -> list[int]:
    return [layer[0] for layer in prefix_sizes(scores, [entries], stays, absent)]


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
    stays = torch.zeros((1, 60), dtype=torch.bool)
    sizes = sizes_of(scores, int(300 * share), stays, stays)
    assert sum(sizes) == int(300 * share)
    masses = prefix_masses(scores, stays, stays)
    # There is a level that all prefixes reach, and none would without its last entry.
    level = mass_at(masses, sizes).min()
    assert mass_at(masses, [size - 1 for size in sizes]).max() <= level
    # Which equal sizes do not.
    uniform = [int(60 * share)] * 5
    assert mass_at(masses, [size - 1 for size in uniform]).max() > mass_at(masses, uniform).min() + 0.05


def test_no_other_allocation_has_a_larger_minimum() -> None:
    generator = torch.Generator().manual_seed(1)
    for seed in range(5):
        scores = unequal(seed=seed)
        stays = torch.zeros((1, 60), dtype=torch.bool)
        sizes = sizes_of(scores, 75, stays, stays)
        masses = prefix_masses(scores, stays, stays)
        reached = mass_at(masses, sizes).min()
        for _ in range(300):
            weights = torch.rand(5, generator=generator) if _ % 2 else torch.tensor(sizes) + torch.randn(5)
            tried = (weights.clamp(min=0.1) / weights.clamp(min=0.1).sum() * 75).long().clamp(max=60)
            tried[int(torch.randint(5, (1,), generator=generator))] += 75 - tried.sum()
            if tried.min() >= 0 and tried.max() <= 60:
                assert mass_at(masses, tried.tolist()).min() <= reached + 1e-12


def test_a_sharp_layer_gets_little_and_a_flat_one_much() -> None:
    sharp = torch.full((100,), 1e-6)
    sharp[17] = 1.0
    scores, stays, absent = layers_of(sharp, torch.ones(100))
    assert sizes_of(scores, 60, stays, absent) == [1, 59]


@pytest.mark.parametrize("kind", ["random", "one-hot", "flat"])
def test_identical_layers_get_equal_sizes(kind: str) -> None:
    layer = {"random": torch.rand(50), "one-hot": torch.eye(50)[3], "flat": torch.ones(50)}[kind]
    scores, stays, absent = layers_of(layer, layer)
    for entries in range(2, 101):
        first, second = sizes_of(scores, entries, stays, absent)
        assert first + second == entries and 0 <= first - second <= 1


def test_tiny_prompts_are_exact_too() -> None:
    for length in range(1, 9):
        for layers in range(1, 5):
            scores = torch.rand(1, layers, length)
            stays = (torch.arange(length) < 1)[None] | (torch.arange(length) >= length - 1)[None]
            for entries in range(layers * min(2, length), layers * length + 1):
                sizes = sizes_of(scores, entries, stays, torch.zeros_like(stays))
                assert sum(sizes) == entries
                assert all(min(2, length) <= size <= length for size in sizes)


def test_what_stays_is_part_of_the_prefix_and_of_its_mass() -> None:
    scores = torch.tensor([[[1.0, 8.0, 1.0, 6.0, 4.0]]])
    stays = torch.tensor([[True, False, False, False, False]])
    masses = prefix_masses(scores, stays, torch.zeros_like(stays))
    torch.testing.assert_close(masses[0, 0], torch.tensor([1, 9, 15, 19, 20]).double() / 20)


def test_holes_count_nothing() -> None:
    scores = unequal(layers=3, length=20)
    padded = torch.cat((torch.full((1, 3, 7), 1e9), scores), dim=2)
    whole, holes = torch.zeros((1, 20), dtype=torch.bool), (torch.arange(27) < 7)[None]
    alone = sizes_of(scores, 30, whole, whole)
    assert sizes_of(padded, 30, torch.zeros_like(holes), holes) == alone


# ------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("length", [40, 120])
@pytest.mark.parametrize("budget", [0.15, 0.25, 0.6, 0.9])
def test_the_total_is_the_budget_and_every_layer_keeps_both_ends(tiny_llama, budget: float, length: int) -> None:
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
        scores.extend(score[0].clone() for score in given)
        return original(self, run, cache, given, seen)

    PrefixKV.shrink = shrink
    try:
        run = called(model, "prefix_kv(score=sum)", inputs=prompt)
    finally:
        PrefixKV.shrink = original
    for layer, score in zip(run.lane.cache.layers, scores, strict=True):
        assert score.sum().item() == pytest.approx(80, rel=1e-4)  # one per query
        middle = score[4:79].topk(layer.length - 5).indices + 4
        assert held(layer) == [0, 1, 2, 3, *sorted(middle.tolist()), 79]


def test_mean_scores_are_sums_over_the_queries_that_see_an_entry(tiny_llama, monkeypatch) -> None:
    model, prompt, scores = tiny_llama(), models.prompt(1, 50), {}

    def shrink(self, run, cache, given, seen):
        scores[self.score] = given
        return original(self, run, cache, given, seen)

    original = PrefixKV.shrink
    monkeypatch.setattr(PrefixKV, "shrink", shrink)
    for score in ("mean", "sum"):
        called(model, f"prefix_kv(score={score})", inputs=prompt)
    for mean, total in zip(scores["mean"], scores["sum"], strict=True):
        torch.testing.assert_close(mean * torch.arange(50, 0, -1), total)


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
        run = called(model, "prefix_kv(budget=0.4)", inputs=prompt, new=60)
    first = [len(positions) for positions in before[0]]
    fixed = states(run).fixed[run.lane.cache]
    assert len(set(first)) > 1  # the layers differ, so their places do
    for index, size in enumerate(first):
        wanted = size - 25 if size - 25 >= 4 else max(4, size // 2)
        assert places[index] == {wanted} == set(fixed.slots[index])
    lengths = [len(positions) for positions in before[-1]]
    assert sum(lengths) <= math.ceil(259 * 0.4) * 3 + 3


@pytest.mark.zoo
def test_equal_sizes_retain_less_in_the_worst_layer_and_raw_sums_choose_badly(zoo) -> None:
    """On held-out code: the least retained mass over the layers, and the likelihood of what follows."""
    from tests.techniques.held_out import losses

    masses: dict[str, float] = {}
    original = PrefixKV.shrink

    def shrink(self, run, cache, given, seen):
        fixed = original(self, run, cache, given, seen)
        retained = []
        for layer, score in zip(cache.layers, given, strict=True):
            kept = torch.tensor(held(layer))
            retained.append(float(score[0, kept].sum() / score[0].sum()))
        masses[self.allocation] = masses.get(self.allocation, 0.0) + min(retained)
        return fixed

    PrefixKV.shrink = shrink
    try:
        loss = losses("prefix_kv", "prefix_kv(allocation=uniform)", "prefix_kv(score=sum)", "random_eviction")
    finally:
        PrefixKV.shrink = original
    assert masses["prefix"] > 1.02 * masses["uniform"]
    assert loss.surely_less("prefix_kv", "random_eviction")
    assert loss.surely_less("prefix_kv", "prefix_kv(score=sum)")
