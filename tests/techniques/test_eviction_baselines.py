"""What every evicting technique must do, and the plain rivals."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import hasten
from hasten.causal.attention import CHUNK_ELEMENTS, AttentionView
from hasten.causal.cache import GROWTH, KVCache
from hasten.causal.kv.eviction import (
    allowance,
    best,
    deletion_slot,
    kept_indices,
    must_stay,
    remove_range,
    remove_slots,
    rows_held,
)
from hasten.causal.kv.heavy_hitter import HeavyHitter
from hasten.causal.kv.running import Running, RunningScores, Size
from hasten.causal.kv.sinks_recent import SinksRecent
from tests import models
from tests.techniques.caches import (
    EVICTING,
    GREEDY,
    cache_of,
    called,
    held,
    knows,
    made,
    other,
    states,
    watched,
)
from tests.techniques.held_out import losses

ROWS = [60, 33, 3]  # lengths of a padded batch; the last is shorter than what always stays


def rows() -> list[Tensor]:
    return [models.prompt(1, length, seed=length)[0] for length in ROWS]


def logits(model, plan: str, inputs: dict[str, Tensor], continuation: Tensor) -> Tensor:
    with hasten.apply(model, plan) as fast:
        found = fast.score(
            inputs["input_ids"], continuation, inputs.get("attention_mask"), logits=True
        )
    assert found.logits is not None
    return found.logits


# ------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", EVICTING)
def test_a_whole_budget_is_the_dense_cache_bit_for_bit(tiny_llama, name: str) -> None:
    model, continuation = tiny_llama(), models.prompt(3, 12, seed=9)
    inputs = models.padded(rows())
    wanted = logits(model, "", inputs, continuation)
    assert torch.equal(logits(model, f"{name}(budget=1)", inputs, continuation), wanted)


def test_a_whole_budget_watches_nothing(tiny_llama, monkeypatch) -> None:
    def computed(*args: object, **kwargs: object) -> None:
        raise AssertionError("attention was computed a second time")

    monkeypatch.setattr(AttentionView, "_weights", computed)
    for name in EVICTING:
        called(tiny_llama(), f"{name}(budget=1)", inputs=models.prompt(1, 40), new=4)


def test_attention_is_computed_again_only_where_it_is_needed(tiny_llama, monkeypatch) -> None:
    passes: dict[str, int] = {}
    original = AttentionView._weights

    def counted(self: AttentionView, start: int, stop: int, length: int) -> Tensor:
        passes[name] = passes.get(name, 0) + 1
        return original(self, start, stop, length)

    monkeypatch.setattr(AttentionView, "_weights", counted)
    for name in EVICTING:
        called(tiny_llama(), name, inputs=models.prompt(1, 40), new=4)
    assert passes == {
        "prefix_kv": 2,  # two layers, the prompt alone
        "elastic_cache": 2,
        "d2o": 2 + 2 * 3,  # and the three passes behind it
        "heavy_hitter": 2 + 2 * 3,
    }


@pytest.mark.parametrize("name", EVICTING)
def test_the_budget_is_kept_and_the_rest_is_freed(tiny_llama, name: str) -> None:
    model, prompt = tiny_llama(num_hidden_layers=4), models.prompt(1, 200)
    lengths: list[list[int]] = []
    kind = type(made(name))
    with watched(
        kind, lambda state, run, cache: lengths.append([layer.length for layer in cache.layers])
    ):
        run = called(model, name, inputs=prompt, new=41)
    total = 200 if name in ("d2o", "heavy_hitter") else 240
    assert sum(lengths[0]) <= 4 * 50 + 4
    assert sum(lengths[-1]) <= math.ceil(total * 0.25) * 4 + 4
    assert sum(lengths[-1]) >= 0.95 * total
    assert run.activity[f"{name}.evicted"] == 4 * 240 - sum(lengths[-1])
    assert run.activity["passes"] == 41
    cache = run.lane.cache
    # Two KV heads of eight numbers, keys and values, four bytes each.
    entry = 2 * 8 * 2 * 4
    assert cache.num_bytes() <= (sum(lengths[-1]) + 4 * 3 * GROWTH) * entry
    assert cache.num_bytes() < 0.6 * called(model, inputs=prompt, new=41).lane.cache.num_bytes()


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("name", [name for name in EVICTING if name != "random_eviction"])
def test_a_row_alone_is_the_row_in_a_padded_batch(tiny_llama, name: str, heads: int) -> None:
    model, continuation = tiny_llama(num_key_value_heads=heads), models.prompt(3, 30, seed=9)
    together = logits(model, name, models.padded(rows()), continuation)
    for index, row in enumerate(rows()):
        alone = logits(model, name, {"input_ids": row[None]}, continuation[index : index + 1])
        torch.testing.assert_close(together[index], alone[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVICTING)
def test_rows_that_stop_early_and_holes(tiny_llama, name: str, dtype: torch.dtype) -> None:
    model, inputs = tiny_llama(dtype=dtype), models.padded(rows())
    free = called(model, name, inputs=inputs, new=4).sequences()[:, 60:]
    end = int(free[0, 3])  # row 0 stops at its fourth token at the latest
    run = called(model, name, inputs=inputs, new=24, eos_token_id=end)
    assert (run.sequences()[0, 64:] == models.EOS).all()
    for layer in run.lane.cache.layers:
        assert layer.keys.isfinite().all() and layer.values.isfinite().all()
        for row, row_held in enumerate(rows_held(layer)):
            assert row_held == len(held(layer, row)) == len(set(held(layer, row))) > 0


@pytest.mark.parametrize("name", EVICTING)
def test_a_draft_that_is_rejected_leaves_nothing_behind(tiny_llama, name: str) -> None:
    model, prompt = tiny_llama(), models.prompt(2, 40)
    plain = called(model, name, inputs=prompt, new=30)
    drafted = called(model, name, knows(other(plain.sequences())), inputs=prompt, new=30)
    assert drafted.activity["passes"] == plain.activity["passes"]
    assert drafted.activity["positions"] > plain.activity["positions"]
    assert torch.equal(drafted.sequences(), plain.sequences())
    for ours, theirs in zip(drafted.lane.cache.layers, plain.lane.cache.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(scores_of(drafted), scores_of(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def scores_of(run) -> list[Tensor]:
    state = states(run)
    return (
        [state.scores[layer] for layer in run.lane.cache.layers]
        if isinstance(state, Running)
        else []
    )


@pytest.mark.parametrize("name", EVICTING)
def test_accepted_drafts_hold_the_budget_too(tiny_llama, name: str) -> None:
    model, inputs = tiny_llama(), models.padded(rows())
    truth = torch.cat((models.padded(rows())["input_ids"], models.prompt(3, 16, seed=3)), dim=1)
    run = called(model, name, knows(truth), inputs=inputs, new=16)
    for _ in range(12):  # until the oracle knows what this plan says, drafts and all
        if torch.equal(run.sequences(), truth):
            break
        truth = run.sequences()
        run = called(model, name, knows(truth), inputs=inputs, new=16)
    assert run.activity["passes"] <= 12
    fixed = name in ("d2o", "heavy_hitter")
    for row, length in enumerate(ROWS):
        total = length if fixed else length + 15
        most = max(5, math.ceil(total * 0.25)) + 1
        kept = [rows_held(layer)[row] for layer in run.lane.cache.layers]
        assert sum(kept) <= len(kept) * most


@pytest.mark.parametrize("pads", [None, torch.tensor([0, 9])])
@pytest.mark.parametrize("block", [30, 4, 1])
def test_attention_received_is_the_same_in_parts(
    block: int, pads: Tensor | None, monkeypatch
) -> None:
    view = models.attention_view(torch.randn(2, 4, block, 8), torch.randn(2, 2, 30, 8), pads=pads)
    weights = view.probabilities() * (view.positions >= 0)[:, None, :, None]
    torch.testing.assert_close(view.received(), weights.sum(dim=2))
    monkeypatch.setitem(CHUNK_ELEMENTS, "cpu", 1000)
    torch.testing.assert_close(view.received(), weights.sum(dim=2))


# --------------------------------------------------------------------------- running scores


class Watcher(HeavyHitter):
    """Keeps scores and evicts nothing."""

    def sizes(self, state: Running, cache: KVCache, seen: list[int]) -> list[Size | None]:
        return [Size([10**6] * len(seen), [1] * len(seen))] * len(cache.layers)


def by_position(run, row: int) -> list[Tensor]:
    """Scores (kv_heads, tokens) of a row in order of position, per layer."""
    found = []
    for layer, scores in zip(run.lane.cache.layers, scores_of(run), strict=True):
        real = layer.positions[row, 0] >= 0
        order = layer.positions[row, 0][real].argsort()
        found.append(scores[row][:, real][:, order])
    return found


@pytest.mark.parametrize("heads", [2, 4])
def test_scores_are_the_attention_of_committed_tokens_only(tiny_llama, heads: int) -> None:
    """Trees, half accepted in one row and rejected in the other, with padding."""
    model = tiny_llama(num_key_value_heads=heads)
    inputs = models.padded([models.prompt(1, 30)[0], models.prompt(1, 21, seed=1)[0]])
    plain = called(model, Watcher(budget=0.5), inputs=inputs, new=25)
    truth = plain.sequences()
    mixed = torch.cat((truth[:1], other(truth[1:])))
    for oracle in (truth, mixed):
        drafted = called(model, Watcher(budget=0.5), knows(oracle), inputs=inputs, new=25)
        assert torch.equal(drafted.sequences(), truth)
        for row, tokens in enumerate((30 + 24, 21 + 24)):
            for ours, theirs in zip(
                by_position(drafted, row), by_position(plain, row), strict=True
            ):
                if (
                    row == 0 and oracle is mixed
                ):  # goes on repeating its last token until row 1 is done
                    assert ours.shape[1] >= tokens
                    continue
                assert ours.shape == (heads, tokens)
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
                # Every token gives each of the query heads that share a KV head a weight of one.
                mass = ours.sum(dim=1)
                torch.testing.assert_close(mass, torch.full_like(mass, tokens * 4 / heads))


def test_scores_follow_their_entries(tiny_llama) -> None:
    """After evictions of both kinds, scores still stand beside the entries that they are of."""
    model, prompt = tiny_llama(), models.prompt(1, 40)
    everything = by_position(called(model, Watcher(budget=0.5), inputs=prompt), 0)
    run = called(model, "heavy_hitter(budget=0.4, running=false)", inputs=prompt, new=12)
    for layer, scores, whole in zip(run.lane.cache.layers, scores_of(run), everything, strict=True):
        assert layer.length == 16
        for head in range(2):
            for position, score in zip(
                held(layer, head=head), scores[0, head].tolist(), strict=True
            ):
                wanted = whole[head, position].item() if position < 40 else 0.0
                assert score == pytest.approx(wanted, abs=1e-5)


def test_heavy_hitters_are_the_best_of_the_old_and_all_of_the_new(tiny_llama) -> None:
    model, prompt = tiny_llama(), models.prompt(2, 40)
    everything = called(model, Watcher(budget=0.5), inputs=prompt)
    run = called(model, "heavy_hitter(budget=0.4, recent_share=0.25)", inputs=prompt)
    for layer, scores in zip(run.lane.cache.layers, scores_of(everything), strict=True):
        for row in range(2):
            for head in range(2):
                old = scores[row, head, :36].topk(12).indices.tolist()
                assert held(layer, row, head) == [*sorted(old), 36, 37, 38, 39]


def test_decoding_pushes_out_the_lowest_score_but_never_a_recent_one(tiny_llama) -> None:
    model, prompt, before = tiny_llama(), models.prompt(1, 40), []
    original = RunningScores._evict

    def check(self, state, cache, layer, size, seen) -> None:
        scores, positions = state.scores[layer].clone(), layer.positions.clone()
        original(self, state, cache, layer, size, seen)
        if scores.shape[2] != 17:
            return
        for head in range(2):
            old = positions[0, head] < seen[0] - 8
            lowest = scores[0, head].masked_fill(~old, math.inf).argmin()
            assert int(positions[0, head, lowest]) not in held(layer, head=head)
            assert len(held(layer, head=head)) == 16
            before.append(int(lowest))

    RunningScores._evict = check
    try:
        called(model, "heavy_hitter(budget=0.4)", inputs=prompt, new=30)
    finally:
        RunningScores._evict = original
    assert len(before) == 29 * 2 * 2 and len(set(before)) > 1


@pytest.mark.zoo
def test_scores_beat_chance_and_frozen_scores_on_held_out_code(zoo) -> None:
    frozen, running = (
        "heavy_hitter(recent_share=0.1, running=false)",
        "heavy_hitter(recent_share=0.1)",
    )
    found = losses("heavy_hitter", "sinks_recent", "random_eviction", frozen, running)
    assert found.surely_less("heavy_hitter", "random_eviction")
    assert found.surely_less("sinks_recent", "random_eviction")
    assert found.surely_less(running, frozen)


# ------------------------------------------------------------------------- sinks and a window


@pytest.mark.parametrize("drafted", [False, True])
def test_sinks_and_the_newest_stay(tiny_llama, drafted: bool) -> None:
    model, prompt, seen = tiny_llama(), models.prompt(1, 40), []
    truth = called(model, "sinks_recent", inputs=prompt, new=24).sequences()

    def check(state, run, cache) -> None:
        tokens = int(run.lane.filled[0])
        seen.append(tokens)
        for layer in cache.layers:
            window = max(5, math.ceil(tokens * 0.25)) - 4
            assert held(layer) == [0, 1, 2, 3, *range(tokens - window, tokens)]

    with watched(SinksRecent, check):
        called(model, "sinks_recent", *([knows(truth)] if drafted else []), inputs=prompt, new=24)
    assert seen[0] == 40 and seen[-1] == 63 and (len(seen) < 24) is drafted


def test_caches_without_statistics_may_be_forked(tiny_llama) -> None:
    model, prompt = tiny_llama(), models.prompt(1, 40)
    wanted = called(model, "sinks_recent", inputs=prompt, new=20).sequences()
    with hasten.apply(model, "sinks_recent") as fast:
        run = fast._run(prompt, None, {"max_new_tokens": 20, **GREEDY})
        run.states = {id(t): t.begin(run, bound) for t, bound in run.slots.entries()}
        run.prefill()
        for _ in range(6):
            run.step()
        twin = run.fork(torch.tensor([0, 0]))
        run.decode()
        twin.decode()
    assert torch.equal(run.sequences(), wanted)
    assert torch.equal(twin.sequences(), wanted.expand(2, -1))


# --------------------------------------------------------------------------------- by chance


def test_chance_repeats_itself_spares_the_ends_and_differs_between_layers_and_seeds(
    tiny_llama,
) -> None:
    model, prompt = tiny_llama(), models.prompt(1, 120)

    def kept(plan: str, new: int = 1) -> list[list[int]]:
        return [
            held(layer) for layer in called(model, plan, inputs=prompt, new=new).lane.cache.layers
        ]

    first = kept("random_eviction")
    assert first == kept("random_eviction") != kept("random_eviction(seed=1)")
    assert first[0] != first[1] and len(first[0]) == len(first[1]) == 30
    for layer in kept("random_eviction", new=30):
        assert layer == sorted(layer) and layer[:4] == [0, 1, 2, 3] and layer[-1] == 148


def test_chance_is_even() -> None:
    """Over many seeds, each middle entry of a prompt stays equally often."""
    counts = torch.zeros(40)
    technique = made("random_eviction")
    generator = technique.begin(None, None)
    for _ in range(400):
        cache = cache_of(torch.randn(1, 1, 40, 2))
        lane = SimpleNamespace(filled=torch.tensor([40]))
        run = SimpleNamespace(lane=lane, pads=torch.tensor([0]), activity=Counter())
        technique.compress(generator, run, cache)
        counts[held(cache.layers[0])] += 1
    assert counts[:4].tolist() == [400] * 4 and counts[39] == 400
    middle = counts[4:39]
    assert abs(middle.mean() - 400 * 5 / 35) < 1e-3
    assert (middle - middle.mean()).abs().max() < 5 * (400 * (5 / 35) * (30 / 35)) ** 0.5


# -------------------------------------------------------------------------- the shared pieces


@pytest.mark.parametrize(
    ("seen", "share", "least", "wanted"),
    [
        (10, 0.3, 1, 3),
        (10, 0.31, 1, 4),
        (1000, 0.3, 1, 300),
        (7, 0.01, 5, 5),
        (3, 1.0, 5, 5),
        (2048, 0.25, 5, 512),
    ],
)
def test_allowance(seen: int, share: float, least: int, wanted: int) -> None:
    assert allowance(seen, share, least) == wanted


def test_best_takes_the_highest_and_the_earlier_of_equals() -> None:
    scores = torch.tensor([[[1.0, 5.0, 5.0, 2.0]], [[-math.inf, 1.0, 1.0, 1.0]]])
    assert best(scores, [2, 2]).int().tolist() == [[[0, 1, 1, 0]], [[0, 1, 1, 0]]]


def test_kept_indices_keep_the_order_and_put_holes_in_front() -> None:
    keep = torch.tensor([[[1, 0, 1, 1]], [[0, 0, 1, 0]]], dtype=torch.bool)
    assert kept_indices(keep).tolist() == [[[0, 2, 3]], [[-1, -1, 2]]]


def test_must_stay_goes_by_positions_and_takes_holes_in() -> None:
    cache = cache_of(torch.randn(2, 1, 6, 2), pads=torch.tensor([0, 2]))
    stays = must_stay(cache.layers[0], [6, 4], 1, [2, 1])
    assert stays[:, 0].int().tolist() == [[1, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 1]]


@pytest.mark.parametrize(
    ("kept", "distance", "wanted"),
    [(100, -25, 75), (100, 10, 10), (30, -25, 5), (28, -25, 14), (5, -25, 4), (10, 25, 5)],
)
def test_deletion_slot(kept: int, distance: int, wanted: int) -> None:
    assert deletion_slot(kept, distance, num_sinks=4) == wanted


@pytest.mark.parametrize("pads", [None, torch.tensor([0, 3])])
@pytest.mark.parametrize("roomy", [False, True])
def test_remove_range_closes_the_gap(pads: Tensor | None, roomy: bool) -> None:
    keys = torch.randn(2, 2, 20, 4)
    cache = cache_of(keys, keys * 2, pads=pads)
    layer, length = cache.layers[0], 20
    if roomy:
        layer.reserve(20 + 4 * GROWTH)
    remove_range(cache, layer, [5, 5], [3, 3])
    first = 0 if pads is None else 3
    for row, pad in enumerate((0, first)):
        left = [p for p in range(length - pad) if not 5 <= p < 8]
        assert held(layer, row) == left
        place = [p + pad for p in left]
        assert torch.equal(layer.keys[row][:, -len(left) :], keys[row][:, place])
        assert torch.equal(layer.values[row][:, -len(left) :], 2 * keys[row][:, place])
    assert layer.length == layer.table.length == 17
    assert layer.buffers[0].shape[2] < 20 + 2 * GROWTH


def test_layers_that_share_positions_lose_entries_alone() -> None:
    cache = KVCache(2, 1, 16, torch.device("cpu"))
    cache.open_block(torch.arange(8)[None], has_holes=False)
    for index in range(2):
        cache.update(torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4), index)
    cache.commit()
    remove_range(cache, cache.layers[0], [2], [1])
    remove_slots(cache, cache.layers[1], torch.tensor([[[3], [0]]]))
    assert held(cache.layers[0]) == [0, 1, 3, 4, 5, 6, 7]
    assert held(cache.layers[1], head=0) == [0, 1, 2, 7, 4, 5, 6]
    assert held(cache.layers[1], head=1) == [7, 1, 2, 3, 4, 5, 6]


def test_remove_slots_takes_one_entry_per_head() -> None:
    keys = torch.randn(1, 2, 6, 4)
    cache = cache_of(keys)
    layer = cache.layers[0]
    remove_slots(cache, layer, torch.tensor([[[1], [5]]]))
    assert torch.equal(layer.keys[0, 0], keys[0, 0, [0, 5, 2, 3, 4]])
    assert torch.equal(layer.keys[0, 1], keys[0, 1, [0, 1, 2, 3, 4]])
    assert held(layer, head=0) == [0, 5, 2, 3, 4] and held(layer, head=1) == [0, 1, 2, 3, 4]
