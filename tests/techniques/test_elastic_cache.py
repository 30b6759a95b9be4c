"""Elastic Cache: what the sheet says would prove it wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hasten.causal.kv.elastic_cache import ElasticCache
from hasten.causal.kv.eviction import kept_indices
from hasten.causal.kv.merging import average_into, nearest_anchor
from tests import models
from tests.techniques.caches import attended, cache_of, called, held, watched
from tests.techniques.held_out import losses

# ----------------------------------------------------------------------------------- merging


def test_the_nearest_anchor_is_the_nearest_and_the_earlier_of_two() -> None:
    anchors = torch.tensor(
        [[0, 1, 0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]
    ).bool()
    found = nearest_anchor(anchors)
    assert found.tolist() == [[1, 1, 1, 1, 5, 5, 5, 7], [-1] * 8, [*range(8)]]


def test_the_nearest_anchor_is_what_a_search_finds() -> None:
    anchors = torch.rand(20, 3, 40) < 0.2
    found = nearest_anchor(anchors)
    for row in range(20):
        for line in range(3):
            places = anchors[row, line].nonzero()[:, 0]
            for here in range(40):
                wanted = int(places[(places - here).abs().argmin()]) if len(places) else -1
                assert int(found[row, line, here]) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_is_over_the_anchor_and_what_is_sent_to_it(dtype: torch.dtype) -> None:
    keys, values = torch.randn(1, 2, 5, 3).to(dtype), torch.randn(1, 2, 5, 3).to(dtype)
    layer = cache_of(keys, values).layers[0]
    average_into(layer, torch.tensor([[[1, 1, 3, 3, 3]]]))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype is torch.bfloat16 else {}
    for new, old in ((layer.keys, keys), (layer.values, values)):
        torch.testing.assert_close(
            new[:, :, 1], old[:, :, :2].float().mean(2).to(dtype), **tolerance
        )
        torch.testing.assert_close(
            new[:, :, 3], old[:, :, 2:].float().mean(2).to(dtype), **tolerance
        )


def test_equal_entries_stay_what_they_are() -> None:
    keys = torch.randn(1, 2, 1, 8).expand(1, 2, 30, 8).contiguous()
    layer = cache_of(keys).layers[0]
    average_into(layer, nearest_anchor(torch.rand(1, 1, 30) < 0.2))
    assert torch.equal(layer.keys, keys) and torch.equal(layer.values, keys)


def smooth(length: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values (1, 2, length, 8) in which neighbours are alike, as image tokens are."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn((4, 8, length + 15), generator=generator)
    walk = torch.nn.functional.avg_pool1d(steps, 16, stride=1)
    keys, values = (walk / walk.std()).unflatten(0, (2, 1, 2)).transpose(3, 4)
    return keys, values


def test_merging_into_the_nearest_beats_dropping_and_random_anchors() -> None:
    error: dict[str, list[float]] = {"nearest": [], "dropped": [], "random": []}
    for seed in range(10):
        keys, values = smooth(seed=seed)
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn((1, 2, 64, 8), generator=generator)
        anchors = torch.zeros((1, 1, 120), dtype=torch.bool)
        anchors[..., torch.randperm(120, generator=generator)[:24]] = True
        places = anchors[0, 0].nonzero()[:, 0]
        here = torch.arange(120).expand(1, 1, -1)
        chance = places[torch.randint(24, (1, 1, 120), generator=generator)]
        targets = {
            "nearest": nearest_anchor(anchors),
            "dropped": here,
            "random": torch.where(anchors, here, chance),
        }
        wanted = attended(query, cache_of(keys, values).layers[0])
        for name, target in targets.items():
            layer = cache_of(keys, values).layers[0]
            average_into(layer, target)
            layer.keep(kept_indices(anchors))
            error[name].append(float((attended(query, layer) - wanted).square().mean()))
    for rival in ("dropped", "random"):
        assert (
            sum(ours < theirs for ours, theirs in zip(error["nearest"], error[rival], strict=True))
            >= 9
        )
        assert sum(error["nearest"]) < 0.8 * sum(error[rival])


def test_entries_that_must_stay_take_nothing_in(tiny_llama, monkeypatch) -> None:
    """What is written into the cache differs from the prompt's own entries at anchors only."""
    model, prompt, merges = tiny_llama(), models.prompt(1, 60), []
    original = ElasticCache._merge

    def merge(self, layer, keep, seen):
        before = layer.keys.clone()
        count = original(self, layer, keep, seen)
        changed = (layer.keys != before).any(dim=-1).any(dim=1)[0]
        nearest = nearest_anchor(
            torch.cat((torch.zeros(4), keep[0, 0, 4:57], torch.zeros(3))).bool()
        )
        wanted = set(nearest[~keep[0, 0]].tolist())
        assert set(changed.nonzero()[:, 0].tolist()) == wanted
        assert not wanted & {0, 1, 2, 3, 57, 58, 59}
        assert count == int((~keep).sum()) == 45
        merges.append(count)
        return count

    monkeypatch.setattr(ElasticCache, "_merge", merge)
    run = called(model, "elastic_cache", inputs=prompt)
    assert run.activity["elastic_cache.merged"] == sum(merges) == 90


# --------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("merge", ["true", "false"])
@pytest.mark.parametrize("budget", [0.11, 0.25, 0.5, 0.93])
def test_the_kept_count_is_exact_at_every_step(tiny_llama, budget: float, merge: str) -> None:
    model, lengths = tiny_llama(), []

    def check(state, run, cache) -> None:
        seen = int(run.lane.filled[0])
        lengths.append(seen)
        for layer in cache.layers:
            positions = held(layer)
            forget = int(seen - seen * budget + 1e-9)
            assert len(positions) == seen - forget == layer.length
            assert positions == sorted(positions)
            assert positions[:4] == [0, 1, 2, 3] and positions[-1] == seen - 1

    with watched(ElasticCache, check):
        called(
            model,
            f"elastic_cache(budget={budget}, merge={merge})",
            inputs=models.prompt(1, 100),
            new=40,
        )
    assert lengths == [*range(100, 140)]


@pytest.mark.parametrize("distance", [-25, 20, 4])
def test_decoding_deletes_one_slot_and_always_the_same(tiny_llama, distance: int) -> None:
    model, before, places = tiny_llama(), [], []

    def check(state, run, cache) -> None:
        seen, now = int(run.lane.filled[0]), [held(layer) for layer in cache.layers]
        if before:
            for old, new in zip(before[-1], now, strict=True):
                grown = [*old, seen - 1]
                gone = [place for place, position in enumerate(grown) if position not in new]
                assert len(gone) == len(grown) - len(new) <= 1
                places.extend(gone)
        before.append(now)

    with watched(ElasticCache, check):
        called(
            model,
            f"elastic_cache(budget=0.5, distance={distance})",
            inputs=models.prompt(1, 150),
            new=30,
        )
    wanted = 75 - 25 if distance < 0 else distance
    assert set(places) == {wanted} and len(places) == 2 * (29 - (90 - 75))
    for old, new in zip(before[0], before[-1], strict=True):
        assert new[:wanted] == old[:wanted]  # what lies before the place is never touched
        # Behind it the cache is a queue: the oldest go first, the last 25 and all new ones stay.
        left = len(new) - wanted
        assert new[wanted:] == [*old, *range(150, 179)][-left:]
        if distance < 0:
            assert left >= 25


def test_the_best_scores_stay(tiny_llama, monkeypatch) -> None:
    model, prompt, scores = tiny_llama(), models.prompt(2, 70), []
    original = ElasticCache.shrink

    def shrink(self, run, cache, given, seen):
        scores.extend(given)
        return original(self, run, cache, given, seen)

    monkeypatch.setattr(ElasticCache, "shrink", shrink)
    run = called(model, "elastic_cache(budget=0.3, score=sum, recent_share=0)", inputs=prompt)
    for layer, score in zip(run.lane.cache.layers, scores, strict=True):
        for row in range(2):
            middle = score[row, 4:69].topk(21 - 5).indices + 4
            assert held(layer, row) == [0, 1, 2, 3, *sorted(middle.tolist()), 69]


def test_short_prompts_lose_nothing_and_decoding_keeps_both_ends(tiny_llama) -> None:
    for length in (1, 3, 5, 6):
        run = called(
            tiny_llama(), "elastic_cache(budget=0.1)", inputs=models.prompt(1, length), new=20
        )
        for layer in run.lane.cache.layers:
            assert held(layer) == [0, 1, 2, 3, length + 18]
        assert math.ceil((length + 18) * 0.1) < 5


PAPERS = "elastic_cache(score=sum, recent_share=0, distance=-25)"


@pytest.mark.zoo
def test_likelihood_of_held_out_code(zoo) -> None:
    found = losses("elastic_cache", "elastic_cache(merge=false)", "random_eviction", PAPERS)
    assert found.surely_less("elastic_cache", "random_eviction")
    assert found.surely_less("elastic_cache(merge=false)", "random_eviction")
    assert found.surely_less("elastic_cache", PAPERS)
