"""D2O: what the sheet says would prove it wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hasten
from hasten.causal.attention import CHUNK_ELEMENTS
from hasten.causal.kv.d2o import D2O, State, layer_shares, unevenness, whole_layers
from hasten.causal.kv.merging import fold_into, most_similar
from hasten.causal.kv.running import RunningScores
from tests import models
from tests.techniques.caches import attended, cache_of, called, held, states
from tests.techniques.held_out import losses

# ------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("total", [0.3, 1.0, 2.5, 4.0, 5.9, 6.0])
def test_shares_add_up_and_lower_unevenness_keeps_more(total: float) -> None:
    uneven = torch.tensor([[0.1, 0.9, 0.4, 0.4, 0.0, 1.0], [0.5] * 6])
    shares = layer_shares(-uneven, total)
    torch.testing.assert_close(
        shares.sum(dim=1), torch.full((2,), total).double(), atol=0.02, rtol=0.0
    )
    assert (shares <= 1.0).all() and (shares >= 0.01).all()
    order = uneven[0].argsort()
    assert (shares[0, order].diff() <= 1e-12).all()
    assert shares[0, 2] == shares[0, 3]
    torch.testing.assert_close(shares[1], torch.full((6,), total / 6).double())


def test_shares_are_a_softmax_where_no_layer_is_full() -> None:
    uneven = torch.rand(3, 5)
    wanted = (-uneven.double()).softmax(dim=1) * 5 * 0.3
    torch.testing.assert_close(layer_shares(-uneven, 5 * 0.3), wanted)


def test_unevenness_is_scaled_over_the_heads_of_a_layer() -> None:
    variance = torch.tensor([[[1.0, 3.0, 2.0], [4.0, 4.0, 12.0], [5.0, 5.0, 5.0]]])
    torch.testing.assert_close(unevenness(variance), torch.tensor([[0.5, 1 / 3, 0.0]]))


@pytest.mark.parametrize(
    ("layers", "budget", "most", "wanted"),
    [
        (32, 0.5, 3, [0, 1, 31]),
        (32, 0.25, 3, [0, 1]),
        (32, 0.5, 1, [0]),
        (8, 0.25, 3, []),
        (8, 0.5, 3, [0]),
        (4, 0.9, 3, []),
        (5, 0.9, 3, [0]),
    ],
)
def test_whole_layers_take_a_quarter_of_the_budget_at_most(
    layers: int, budget: float, most: int, wanted: list[int]
) -> None:
    assert whole_layers(layers, budget, most) == wanted
    assert len(wanted) <= layers * budget / 4


@pytest.mark.parametrize(
    "plan", ["d2o(budget=0.3)", "d2o(budget=0.7)", "d2o(budget=0.7, num_whole=0)"]
)
def test_the_budget_is_the_whole_caches(tiny_llama, plan: str) -> None:
    model = tiny_llama(num_hidden_layers=6)
    run = called(model, plan, inputs=models.prompt(2, 150))
    budget = 0.7 if "0.7" in plan else 0.3
    for row in range(2):
        kept = [len(held(layer, row)) for layer in run.lane.cache.layers]
        assert 6 * 150 * budget <= sum(kept) <= 6 * 150 * budget + 6
        assert (kept[0] == 150) is (
            plan == "d2o(budget=0.7)"
        )  # a quarter of 4.2 layers pays for one
    assert len({layer.length for layer in run.lane.cache.layers}) > 1


def test_variances_are_those_of_the_prompts_attention(tiny_llama, monkeypatch) -> None:
    model, seen = tiny_llama(), []
    original = D2O.watch_prompt

    def watch(self, state, view, received):
        original(self, state, view, received)
        seen.append((received, view.positions, state.variance[view.layer]))

    monkeypatch.setattr(D2O, "watch_prompt", watch)
    inputs = models.padded([models.prompt(1, 30)[0], models.prompt(1, 12, seed=1)[0]])
    called(model, "d2o", inputs=inputs)
    assert len(seen) == 2
    for received, positions, variance in seen:
        for row in range(2):
            real = received[row][:, positions[row] >= 0]
            torch.testing.assert_close(variance[row], real.var(dim=1))


# ----------------------------------------------------------------------------------- merging


def test_the_most_similar_is_the_cosines_argmax_over_the_kept() -> None:
    keys = torch.randn(2, 3, 20, 8)
    evicted = torch.rand(2, 3, 20).argsort(dim=-1)[..., :6].sort(dim=-1).values
    evicted[1, :, -2:] = -1
    absent = torch.zeros((2, 1, 20), dtype=torch.bool)
    absent[0, 0, :3] = True
    alike, target = most_similar(keys, evicted, absent)
    for row in range(2):
        for head in range(3):
            gone = set(evicted[row, head].tolist())
            kept = [i for i in range(20) if i not in gone and not absent[row, 0, i]]
            for place, entry in enumerate(evicted[row, head].tolist()):
                if entry < 0:
                    continue
                cosine = torch.cosine_similarity(
                    keys[row, head, entry], keys[row, head, kept], dim=-1
                )
                assert alike[row, head, place].item() == pytest.approx(
                    float(cosine.max()), abs=1e-5
                )
                assert int(target[row, head, place]) == kept[int(cosine.argmax())]


def test_the_most_similar_is_found_in_parts_too(monkeypatch) -> None:
    keys, evicted = torch.randn(1, 2, 40, 8), torch.arange(30).expand(1, 2, -1)
    whole = most_similar(keys, evicted)
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 400)
    for part, wanted in zip(most_similar(keys, evicted), whole, strict=True):
        torch.testing.assert_close(part, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["scaled", "normalised"])
def test_a_merge_is_the_formula(form: str, dtype: torch.dtype) -> None:
    """Two entries go into one, one is discarded, and one alone gives the same as among others."""
    keys, values = torch.randn(1, 1, 6, 4).to(dtype), torch.randn(1, 1, 6, 4).to(dtype)
    evicted, target = torch.tensor([[[1, 2, 4]]]), torch.tensor([[[0, 0, 3]]])
    u = torch.tensor([[[0.9, 0.4, 0.7]]])
    taken = torch.tensor([[[1.0, 1.0, 0.0]]])
    weight = (u if form == "scaled" else u.exp()) * taken
    own = 1.0 if form == "scaled" else math.e
    counted = taken if form == "scaled" else weight
    layer = cache_of(keys, values).layers[0]
    fold_into(layer, evicted, target, weight, counted, own)
    for new, old in ((layer.keys, keys.float()), (layer.values, values.float())):
        top = own * old[0, 0, 0] + weight[0, 0, 0] * old[0, 0, 1] + weight[0, 0, 1] * old[0, 0, 2]
        bottom = own + counted[0, 0, 0] + counted[0, 0, 1]
        torch.testing.assert_close(new[0, 0, 0], (top / bottom).to(dtype), atol=1e-2, rtol=1e-2)
        assert torch.equal(new[0, 0, 1:], old[0, 0, 1:].to(dtype))
    if form == "normalised":
        assert float((own + weight.sum()) / (own + counted.sum())) == pytest.approx(1.0)

    single, among = cache_of(keys, values).layers[0], cache_of(keys, values).layers[0]
    fold_into(single, evicted[..., :1], target[..., :1], weight[..., :1], counted[..., :1], own)
    only = torch.tensor([[[1.0, 0.0, 0.0]]])
    fold_into(among, evicted, target, weight * only, counted * only, own)
    torch.testing.assert_close(single.keys, among.keys)
    torch.testing.assert_close(single.values, among.values)


@pytest.mark.parametrize("count", [1, 3])
def test_a_duplicate_goes_without_a_trace(count: int) -> None:
    """u = 1, so the code's mean gives the kept entry back; only the duplicate's own weight is lost."""
    keys = torch.randn(1, 2, 40, 8)
    keys[:, :, 30 : 30 + count] = keys[:, :, 7:8]
    values = torch.randn(1, 2, 40, 8)
    values[:, :, 30 : 30 + count] = values[:, :, 7:8]
    cache = cache_of(keys, values)
    layer = cache.layers[0]
    evicted = torch.arange(30, 30 + count).expand(1, 2, -1)
    alike, target = most_similar(layer.keys, evicted)
    torch.testing.assert_close(alike, torch.ones_like(alike))
    assert (target == 7).all()
    fold_into(layer, evicted, target, alike, torch.ones_like(alike), own=1.0)
    torch.testing.assert_close(layer.keys, keys)
    torch.testing.assert_close(layer.values, values)


def test_outputs_hardly_change_when_a_duplicate_is_evicted() -> None:
    keys, values = torch.randn(1, 1, 200, 8), torch.randn(1, 1, 200, 8)
    keys[:, :, 150], values[:, :, 150] = keys[:, :, 7], values[:, :, 7]
    query = torch.randn(1, 1, 32, 8) * 0.3
    wanted = attended(query, cache_of(keys, values).layers[0])
    layer = cache_of(keys, values).layers[0]
    alike, target = most_similar(layer.keys, torch.tensor([[[150]]]))
    fold_into(layer, torch.tensor([[[150]]]), target, alike, torch.ones_like(alike), own=1.0)
    layer.keep(torch.tensor([[[i for i in range(200) if i != 150]]]))
    error = float((attended(query, layer) - wanted).square().mean())
    # Its own share of the softmax, one part in 200, is what is lost.
    assert error < 1e-4 * float(values.square().mean())


def clusters(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twenty kinds of entries, six nearly alike of each; the first of each kind is kept."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn((2, 1, 2, 20, 1, 8), generator=generator) * 1.5
    noise = torch.randn((2, 1, 2, 20, 6, 8), generator=generator) * 0.5
    keys, values = (kinds + noise).flatten(3, 4)
    evicted = torch.tensor([i for i in range(120) if i % 6])[None, None].expand(1, 2, -1)
    query = torch.randn((1, 2, 64, 8), generator=generator)
    return keys, values, evicted, query


@pytest.mark.parametrize("form", ["scaled", "normalised"])
def test_merging_into_the_most_similar_beats_dropping_and_random_targets(form: str) -> None:
    error: dict[str, list[float]] = {"similar": [], "dropped": [], "random": []}
    for seed in range(10):
        keys, values, evicted, query = clusters(seed)
        wanted = attended(query, cache_of(keys, values).layers[0])
        alike, target = most_similar(keys, evicted)
        generator = torch.Generator().manual_seed(seed)
        chance = 6 * torch.randint(20, target.shape, generator=generator)
        for name, into, taken in (
            ("similar", target, 1.0),
            ("dropped", target, 0.0),
            ("random", chance, 1.0),
        ):
            layer = cache_of(keys, values).layers[0]
            if form == "scaled":
                fold_into(
                    layer, evicted, into, alike * taken, torch.full_like(alike, taken), own=1.0
                )
            else:
                fold_into(
                    layer, evicted, into, alike.exp() * taken, alike.exp() * taken, own=math.e
                )
            layer.keep(torch.arange(0, 120, 6).expand(1, 2, -1))
            error[name].append(float((attended(query, layer) - wanted).square().mean()))
    for rival in ("dropped", "random"):
        assert (
            sum(ours < theirs for ours, theirs in zip(error["similar"], error[rival], strict=True))
            >= 9
        )
        assert sum(error["similar"]) < 0.8 * sum(error[rival])


# ------------------------------------------------------------------------------- the threshold


def decoded(model, plan: str, **more) -> tuple[Tensor, dict[str, float]]:
    prompt, continuation = models.prompt(2, 60), models.prompt(2, 25, seed=4)
    with hasten.apply(model, plan) as fast:
        score = fast.score(prompt, continuation, logits=True)
        return score.logits, fast.activity


def test_an_infinite_bar_only_evicts_and_none_at_all_merges_everything(tiny_llama) -> None:
    model = tiny_llama()
    dropped, activity = decoded(model, "d2o(merge=drop)")
    never, same = decoded(model, "d2o(threshold=inf)")
    assert torch.equal(never, dropped) and same == activity and "d2o.merged" not in activity
    always, everything = decoded(model, "d2o(threshold=-1e9)")
    assert everything["d2o.merged"] == everything["d2o.evicted"] == activity["d2o.evicted"]
    assert not torch.equal(always, dropped)
    some = decoded(model, "d2o")[1]
    assert 0 < some["d2o.merged"] < some["d2o.evicted"]


def test_the_bar_is_the_moving_mean_of_the_similarities() -> None:
    technique, state = D2O(smoothing=0.3), State()
    layer = cache_of(torch.randn(2, 1, 12, 4)).layers[0]
    alike = [torch.tensor([[0.8, 0.4], [0.2, 0.0]]), torch.tensor([[0.1, 0.9], [0.6, 0.4]])]
    real = torch.tensor([[True, True], [False, False]])
    assert technique._bar(state, layer, alike[0], real)[0].item() == pytest.approx(0.6)
    # The second row had nothing to evict so far: its first mean starts its bar.
    bars = technique._bar(state, layer, alike[1], torch.ones_like(real))
    torch.testing.assert_close(bars, torch.tensor([0.3 * 0.6 + 0.7 * 0.5, 0.5]))
    bars = technique._bar(state, layer, alike[0], real)
    torch.testing.assert_close(bars, torch.tensor([0.3 * 0.53 + 0.7 * 0.6, 0.5]))


def test_heads_merge_together_by_their_mean_similarity() -> None:
    """One head's entry is alike and the other's is not; the mean decides for both."""
    keys = torch.tensor(
        [[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]]
    )[None]
    for threshold, merged in ((0.1, 1), (0.2, 0)):  # mean of 1 and -0.7 is 0.15
        layer, state = cache_of(keys).layers[0], State()
        D2O(threshold=threshold).before_removal(state, layer, torch.tensor([[[2], [2]]]))
        assert int(state.merged) == merged
        changed = (layer.keys != keys).any(dim=-1)[0]
        assert changed.tolist() == (
            [[True, False, False], [True, False, False]] if merged else [[False] * 3] * 2
        )


# ------------------------------------------------------------------------------------ eviction


def test_sinks_the_newest_and_the_best_stay_per_head(tiny_llama) -> None:
    run = called(tiny_llama(), "d2o(allocation=uniform, merge=drop)", inputs=models.prompt(2, 80))
    kept = {
        (row, head): held(layer, row, head)
        for layer in run.lane.cache.layers
        for row in range(2)
        for head in range(2)
    }
    for positions in kept.values():
        assert len(positions) == 20 and positions[:4] == [0, 1, 2, 3]
        assert positions[-10:] == [*range(70, 80)]
    assert len({tuple(positions) for positions in kept.values()}) > 1


def test_the_size_is_fixed_by_the_prompt_and_each_step_evicts_one(tiny_llama) -> None:
    model, counts = tiny_llama(), []
    original = RunningScores._evict

    def evict(self, state, cache, layer, size, seen) -> None:
        before = layer.length
        original(self, state, cache, layer, size, seen)
        counts.append((before - layer.length, layer.length))

    RunningScores._evict = evict
    try:
        run = called(model, "d2o", inputs=models.prompt(1, 80), new=31)
    finally:
        RunningScores._evict = original
    first, steps = counts[:2], counts[2:]
    assert all(gone > 50 for gone, _ in first)
    assert [gone for gone, _ in steps] == [1] * 60
    assert {length for _, length in steps[::2]} == {first[0][1]}
    assert len(states(run).bars) == 2


@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 9])
def test_tiny_prompts_keep_sinks_and_one_more(tiny_llama, length: int) -> None:
    run = called(tiny_llama(), "d2o(budget=0.1)", inputs=models.prompt(1, length), new=20)
    for layer in run.lane.cache.layers:
        assert sorted(held(layer))[:4] == [0, 1, 2, 3] and len(held(layer)) == 5
        assert length + 18 in held(layer)


@pytest.mark.zoo
def test_likelihood_of_held_out_code(zoo) -> None:
    found = losses("d2o", "random_eviction", "d2o(score=sum, merge=scaled)")
    assert found.surely_less("d2o", "random_eviction")
    assert found.surely_less("d2o", "d2o(score=sum, merge=scaled)")


@pytest.mark.zoo
def test_frozen_scores_lose(zoo) -> None:
    """With few entries that are simply the newest, what decoding adds to the scores matters."""
    found = losses("d2o(recent_share=0.1)", "d2o(recent_share=0.1, running=false)")
    assert found.surely_less("d2o(recent_share=0.1)", "d2o(recent_share=0.1, running=false)")
