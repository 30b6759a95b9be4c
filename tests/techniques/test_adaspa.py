"""AdaSpa: exact masses, heads of their own budgets, and when blocks are searched for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import hasten
from hasten.denoise.attention import adaspa, masses, sparse
from hasten.denoise.attention.adaspa import AdaSpa, Found, index_dtype
from hasten.denoise.attention.masses import best_blocks, budgets, recall, search
from hasten.denoise.attention.sparse import Cells, Sequences
from hasten.denoise.run import Run
from hasten.errors import PlanError
from hasten.plan import Plan
from tests.pipelines import call, picture, tiny
from tests.techniques.attending import (
    CPU,
    attention_call,
    masked_dense,
    run_attention,
    seen_tokens,
)
from tests.techniques.denoising import db, made, own, zoo_sample

LARGE = {"height": 32, "width": 32}
PLAN = "adaspa(block=4, sparsity=0.5)"


def taken_apart(
    tokens: int = 64, block: int = 8, *, behind: int = 0, **how: Any
) -> tuple[Any, Cells, Sequences]:
    attention = attention_call(tokens, behind=behind, **how)
    cells = Cells.of((tokens,), (block,), CPU)
    parts = Sequences.of(attention, cells, 0)
    assert parts is not None
    return attention, cells, parts


# ---------------------------------------------------------------------------------------- searching
@pytest.mark.parametrize("held", [masses.HELD, 3000])
@pytest.mark.parametrize(("tokens", "behind"), [(64, 0), (64, 5), (61, 0), (50, 3)])
def test_each_row_of_the_softmax_sums_to_one(
    tokens: int, behind: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masses, "HELD", held)  # in few or in many pieces
    attention, cells, parts = taken_apart(tokens, behind=behind)
    found = search(parts, cells)
    rows = torch.full((cells.count,), cells.size) if cells.valid is None else cells.valid.sum(dim=1)
    total = found.blocks.sum(dim=-1) + found.text
    torch.testing.assert_close(total, rows.float().expand_as(total), atol=1e-4, rtol=1e-5)
    assert found.output is None
    scores = attention.query @ attention.key.transpose(-1, -2) * parts.scale
    chance = scores.softmax(dim=-1)[:, :, :tokens, :tokens].flatten(0, 1)
    block = cells.inverse // cells.size
    for row, column in ((0, 0), (2, 5), (cells.count - 1, 1)):
        expected = chance[:, block == row][:, :, block == column].sum(dim=(1, 2))
        torch.testing.assert_close(found.blocks[:, row, column], expected, atol=1e-5, rtol=1e-4)


def test_one_pass_with_the_true_sums_is_the_two_passes() -> None:
    attention, cells, parts = taken_apart(61, behind=3)
    exact = search(parts, cells)
    fused = search(parts, cells, exact.lse)
    torch.testing.assert_close(fused.blocks, exact.blocks, atol=1e-6, rtol=1e-6)
    assert fused.output is not None
    result = sparse.whole(attention, fused.output, cells, 0)
    torch.testing.assert_close(result, attention.dense(), atol=1e-5, rtol=1e-5)


def test_wrong_sums_change_what_is_kept_but_not_the_output() -> None:
    attention, cells, parts = taken_apart(sharp=2.0)
    exact = search(parts, cells)
    wrong = exact.lse + 3.0 * torch.randn(
        exact.lse.shape, generator=torch.Generator().manual_seed(1)
    )
    fused = search(parts, cells, wrong)
    assert not torch.equal(best_blocks(fused.blocks, 3), best_blocks(exact.blocks, 3))
    assert fused.output is not None
    result = sparse.whole(attention, fused.output, cells, 0)
    torch.testing.assert_close(result, attention.dense(), atol=1e-5, rtol=1e-4)
    shifted = search(parts, cells, exact.lse + 1.0)  # each row by the same: the order stays
    assert torch.equal(best_blocks(shifted.blocks, 3), best_blocks(exact.blocks, 3))
    far = search(parts, cells, exact.lse - 500.0)  # numbers run over: found anew
    torch.testing.assert_close(far.blocks, exact.blocks, atol=1e-5, rtol=1e-5)


def test_recall_is_of_the_whole_softmax() -> None:
    _, cells, parts = taken_apart(sharp=2.0)
    found = search(parts, cells)
    shares = [recall(found, count, cells) for count in range(1, cells.count + 1)]
    assert bool((shares[2] < 0.95).all()) and bool((shares[2] > 3 / 8).all())
    torch.testing.assert_close(shares[-1], torch.ones_like(shares[-1]), atol=1e-5, rtol=0)
    assert all(bool((a <= b + 1e-6).all()) for a, b in pairwise(shares))


def test_exact_search_keeps_more_than_an_estimate_and_that_more_than_chance() -> None:
    _, cells, parts = taken_apart(128, sharp=3.0)
    found = search(parts, cells)
    kept = {}
    luck = torch.rand(found.blocks.shape, generator=torch.Generator().manual_seed(0))
    for name, ranking in (
        ("exact", found.blocks),
        ("pooled", masses.pooled(parts, cells)),
        ("random", luck),
    ):
        blocks = best_blocks(ranking, 4)
        kept[name] = float(found.blocks.gather(-1, blocks).sum() / found.blocks.sum())
    assert kept["exact"] > kept["pooled"] > kept["random"]


def test_a_block_of_queries_always_reads_its_own() -> None:
    blocks = best_blocks(torch.rand(3, 6, 6), 2)
    assert torch.equal(blocks[..., 0], torch.arange(6).expand(3, 6))
    assert bool((blocks[..., 0] != blocks[..., 1]).all())


# ------------------------------------------------------------------------------------------ budgets
@pytest.mark.parametrize("heads", [1, 2, 5, 8])
@pytest.mark.parametrize(("count", "blocks"), [(1, 4), (3, 16), (8, 16), (14, 16), (16, 16)])
def test_heads_keep_the_given_number_on_average(heads: int, count: int, blocks: int) -> None:
    recalls = torch.rand(3, heads, generator=torch.Generator().manual_seed(0))
    kept = budgets(recalls, count, blocks)
    assert kept.sum(dim=1).tolist() == [count * heads] * 3
    assert int(kept.min()) >= 1 and int(kept.max()) <= blocks
    for row, share in zip(kept, recalls, strict=True):
        assert bool((row[share.argsort()].diff() <= 0).all())  # who loses less keeps less


def test_the_papers_sparsity_of_heads() -> None:
    kept = budgets(torch.arange(6.0)[None], 20, 100)  # 0.8: half of them 0.9, half 0.7
    assert kept.tolist() == [[30, 30, 30, 10, 10, 10]]


def test_budgets_raise_the_least_recall() -> None:
    """Heads from flat to sharp: at the same mean, the flat ones get what the sharp ones do not need."""
    attention = attention_call(256, heads=4, batch=1)
    attention.arguments["query"] *= torch.tensor([0.2, 0.5, 4.0, 8.0]).view(1, 4, 1, 1)
    cells = Cells.of((256,), (8,), CPU)
    parts = Sequences.of(attention, cells, 0)
    assert parts is not None
    found, count = search(parts, cells), 8
    even = recall(found, count, cells)
    kept = budgets(even[None], count, cells.count)[0]
    each = torch.stack([recall(found, int(n), cells)[i] for i, n in enumerate(kept)])
    assert float(each.min()) > float(even.min()) + 0.05


# ---------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize(("before", "behind"), [(0, 0), (4, 0), (0, 4)])
def test_only_the_kept_blocks_are_read(before: int, behind: int) -> None:
    attention = attention_call(60, before=before, behind=behind)
    cells = Cells.of((60,), (8,), CPU)
    parts = Sequences.of(attention, cells, before)
    assert parts is not None
    keys = best_blocks(search(parts, cells).blocks, 5).unflatten(0, (2, 4)).to(torch.int16)
    kept = torch.tensor([[1, 3, 3, 5], [3, 1, 5, 3]])
    seen = torch.zeros(2, 4, cells.count, cells.count, dtype=torch.bool)
    for b in range(2):
        for h in range(4):
            seen[b, h].scatter_(1, keys[b, h, :, : int(kept[b, h])].long(), True)
    found = Found.of(keys, kept, None, (0, 1))
    result, counted = run_attention(attention, cells, list(found.reads), before=before)
    expected = masked_dense(attention, seen_tokens(cells, seen, before=before, behind=behind))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    text, length = before + behind, 60 + before + behind
    pairs = 64 * (int(kept.sum()) * 8 + 8 * text) + 8 * text * length
    assert counted["x.pairs"] == pairs


def test_keeping_every_block_is_dense() -> None:
    attention, cells, parts = taken_apart(64, behind=3)
    keys = best_blocks(search(parts, cells).blocks, cells.count)
    got = parts.read(sparse.Reads(keys))
    result = sparse.whole(attention, got, cells, 0)
    torch.testing.assert_close(result, attention.dense(), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------- pipelines
@pytest.mark.parametrize("plan", ["adaspa(sparsity=0.0, block=4)", "adaspa(block=4096)"])
def test_nothing_left_out_is_the_original_bit_for_bit(plan: str) -> None:
    pipe = tiny("pixart")
    more = {"num_inference_steps": 8, **LARGE}
    result, activity = made(pipe, "pixart", plan, **more)
    assert torch.equal(result, picture(pipe(**call("pixart", **more))))
    assert not own(activity, "adaspa")


class Noted:
    """At which steps blocks were searched for, and what was found."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.fused: list[bool] = []
        self.used: dict[int, list[Tensor]] = {}
        search_, attend_ = AdaSpa._search, adaspa.attend

        def noted_search(technique: Any, state: Any, run: Run, *rest: Any) -> Tensor:
            if not self.steps or self.steps[-1] != run.index:
                self.steps.append(run.index)
                self.fused.append(rest[-1] is not None)
            return search_(technique, state, run, *rest)

        def noted_attend(run: Run, *rest: Any) -> Tensor:
            self.used.setdefault(run.index, []).extend(reads.keys for reads in rest[-1])
            return attend_(run, *rest)

        monkeypatch.setattr(AdaSpa, "_search", noted_search)
        monkeypatch.setattr(adaspa, "attend", noted_attend)


@pytest.mark.parametrize(("steps", "searches"), [(50, [10, 30]), (10, [2, 6]), (20, [4, 12])])
def test_searches_are_at_a_fifth_and_at_three_fifths(
    steps: int, searches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = Noted(monkeypatch)
    _, activity = made(tiny("dit"), "dit", PLAN, num_inference_steps=steps)
    assert noted.steps == searches and noted.fused == [False, True]
    assert activity["adaspa.searches"] == 2 * 3
    dense = [step for step in range(steps) if step not in noted.used]
    assert dense == [*range(searches[0] + 1), searches[1]]
    first, second = (noted.used[step + 1] for step in searches)
    for step in range(searches[0] + 1, searches[1]):  # indices are reused as they are
        assert all(torch.equal(a, b) for a, b in zip(noted.used[step], first, strict=True))
    assert any(
        a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, second, strict=False)
    )


def test_steps_before_the_first_search_are_the_originals() -> None:
    pipe = tiny("pixart")
    samples = []
    for plan in ("", PLAN):
        with hasten.apply(pipe, *[plan] * bool(plan)) as fast:
            run = fast.start()
            run.trace = []
            fast._execute(run, **call("pixart", num_inference_steps=10, **LARGE))
            samples.append([step.result for step in run.trace])
    same = [torch.equal(a, b) for a, b in zip(*samples, strict=True)]
    assert same == [True] * 3 + [False] * 7  # the search itself gives the dense attention


def test_a_search_that_falls_on_a_skipped_step_is_made_at_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hasten.denoise.gate.reuse_always import ReuseAlways

    noted = Noted(monkeypatch)
    monkeypatch.setattr(ReuseAlways, "decide", lambda self, state, run, call: run.index % 4 == 3)
    made(tiny("dit"), "dit", PLAN, "reuse_always", num_inference_steps=20)
    assert noted.steps == [7, 15]  # due at 4 and 12


def test_a_new_size_is_searched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found at one size says nothing of another: no step reads it there."""
    noted = Noted(monkeypatch)
    switching = "bottleneck_sampling(first=0.5, last=0.2)"
    more = {"num_inference_steps": 20, **LARGE}
    result, _ = made(tiny("pixart"), "pixart", PLAN, switching, **more)
    assert torch.isfinite(result).all()
    # The usual one at 4; at 10 the sample gets smaller; 12 is due; at 16 it gets its size back.
    assert noted.steps == [4, 10, 12, 16]
    assert noted.fused == [False, False, True, False]
    blocks = {step: {keys.shape[-2] for keys in used} for step, used in noted.used.items()}
    assert set(noted.used) == {*range(5, 10), 11, *range(13, 16), *range(17, 20)}
    large, small = blocks[5], blocks[11]
    assert large != small and blocks[17] == large and blocks[13] == small


def test_what_was_found_belongs_to_one_sample() -> None:
    """Particles and streams put other samples in its place, and some leave tokens out."""
    for other in ("rollover_budget_forcing", "stream_diffusion"):
        with pytest.raises(PlanError, match="adaspa needs one sample that moves on"):
            Plan.parse("adaspa", other)
        Plan.parse("grat", other)  # whose pattern is nobody's
    for other in ("just_in_time", "sada(tokens=0.5)"):
        with pytest.raises(PlanError, match="adaspa needs all tokens"):
            Plan.parse("adaspa", other)
    for other in ("zeus", "easy_cache", "sada", "bottleneck_sampling", "adaptive_guidance"):
        Plan.parse("adaspa", other)  # it searches where the network runs, and anew at each size


def test_what_is_kept_takes_two_bytes_a_block() -> None:
    found: list[Found] = []
    with hasten.apply(tiny("pixart"), PLAN) as fast:
        run = fast.start()
        fast._execute(run, **call("pixart", num_inference_steps=10, **LARGE))
        (state,) = run.states.values()
        found += state.found.values()
    assert len(found) == 3 and all(one.keys.dtype == torch.int16 for one in found)
    for blocks in (1, 32_767, 32_768, 200_000):
        last = torch.tensor(blocks - 1).to(index_dtype(blocks))
        assert int(last) == blocks - 1


@pytest.mark.parametrize("choose", ["exact", "pooled", "random"])
def test_the_same_again(choose: str) -> None:
    pipe = tiny("pixart")
    plan = f"adaspa(block=4, sparsity=0.5, choose={choose})"
    more = {"num_inference_steps": 5, **LARGE}
    with hasten.apply(pipe, plan) as fast:
        first = picture(fast(**call("pixart", **more)))
        counted = own(fast.activity, "adaspa")
        assert torch.equal(picture(fast(**call("pixart", **more))), first)
        assert counted == own(fast.activity, "adaspa") and counted["adaspa.pairs_saved"] > 0
    assert not torch.equal(picture(pipe(**call("pixart", **more))), first)


def test_too_few_steps_do_nothing() -> None:
    pipe = tiny("pixart")
    more = {"num_inference_steps": 2, **LARGE}
    result, activity = made(pipe, "pixart", "adaspa(block=4, second=0, first=30)", **more)
    assert torch.equal(result, picture(pipe(**call("pixart", **more))))
    assert "adaspa.pairs" not in activity


@pytest.mark.parametrize("family", ["flux", "cogview4", "unet"])
def test_joint_sequences_two_calls_a_step_and_levels(family: str) -> None:
    pipe = tiny(family)
    more = {"num_inference_steps": 5, **LARGE}
    result, activity = made(pipe, family, PLAN, **more)
    assert torch.isfinite(result).all() and activity["adaspa.pairs_saved"] > 0
    assert not torch.equal(result, picture(pipe(**call(family, **more))))


def test_rows_left_out_by_a_guider() -> None:
    pipe = tiny("pixart")
    cut, more = "adaptive_guidance(threshold=-1.0)", {"num_inference_steps": 10, **LARGE}
    result, activity = made(pipe, "pixart", cut, PLAN, **more)
    assert activity["left_out"] > 0 and activity["adaspa.pairs"] > 0
    assert activity["adaspa.searches"] == 2 * 3 and torch.isfinite(result).all()


def test_bfloat16() -> None:
    pipe = tiny("pixart", dtype=torch.bfloat16)
    result, activity = made(pipe, "pixart", PLAN, num_inference_steps=5, **LARGE)
    assert torch.isfinite(result.float()).all() and activity["adaspa.pairs"] > 0


# --------------------------------------------------------------------------------------- the zoo
@pytest.mark.zoo
@pytest.mark.thorough
def test_what_matters_stays_between_steps_more_than_between_prompts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The claim itself, as overlap of what is kept."""
    kept: list[list[Tensor]] = []
    original = AdaSpa._search

    def noted(technique: Any, state: Any, run: Run, *rest: Any) -> Tensor:
        output = original(technique, state, run, *rest)
        found = state.found[rest[3]]
        kept[-1].append(found.keys[..., : technique.keep(rest[1].count)].long())
        return output

    monkeypatch.setattr(AdaSpa, "_search", noted)
    for seed in (0, 1):
        kept.append([])
        plan = "adaspa(block=16, sparsity=0.7, adaptive=false)"
        zoo_sample("scenes-video", plan, steps=20, count=1, seed=seed)

    def overlap(ones: list[Tensor], others: list[Tensor]) -> float:
        shares = []
        for a, b in zip(ones, others, strict=True):
            both = (a[..., None] == b[..., None, :]).any(dim=-1).sum(dim=-1)
            shares.append(both.double().div(2 * a.shape[-1] - both).mean())
        return float(torch.stack(shares).mean())

    half = len(kept[0]) // 2
    first, second = kept[0][:half], kept[0][half:]
    assert overlap(first, second) > overlap(first, kept[1][:half])
    others = [keys.roll(1, dims=1) for keys in first]  # (batch, heads, ...): each head's neighbour
    assert overlap(first, second) > overlap(first, others)


@pytest.mark.zoo
@pytest.mark.thorough
def test_on_a_trained_model_exact_search_keeps_most_of_the_softmax(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More than an estimate from mean queries and keys, that more than chance; and a fixed window."""
    kept: dict[str, list[Tensor]] = {}
    least: dict[str, list[Tensor]] = {"adaptive": [], "even": []}
    luck = torch.Generator().manual_seed(0)

    def noted(technique: Any, state: Any, run: Run, call: Any, cells: Cells, *rest: Any) -> Tensor:
        parts = Sequences.of(call, cells, rest[0])
        assert parts is not None
        found, count = search(parts, cells), technique.keep(cells.count)
        places = torch.arange(cells.count)
        near = -(places[:, None] - places).abs().float().expand_as(found.blocks)
        chance = torch.rand(found.blocks.shape, generator=luck)
        rankings = {"exact": found.blocks, "pooled": masses.pooled(parts, cells)}
        for name, ranking in {**rankings, "window": near, "random": chance}.items():
            some = found.blocks.gather(-1, best_blocks(ranking, count)).sum()
            share = (some + found.text.sum()) / (found.blocks.sum() + found.text.sum())
            kept.setdefault(name, []).append(share)
        heads = call.query.shape[:2]
        even = recall(found, count, cells)
        numbers = budgets(even.unflatten(0, heads), count, cells.count).flatten().tolist()
        each = [recall(found, n, cells)[i] for i, n in enumerate(numbers)]
        least["even"].append(even.unflatten(0, heads).amin(dim=1).mean())
        least["adaptive"].append(torch.stack(each).unflatten(0, heads).amin(dim=1).mean())
        return call.dense()

    monkeypatch.setattr(AdaSpa, "_search", noted)
    zoo_sample("scenes-video", "adaspa(block=16, sparsity=0.7)", steps=5, count=1)
    mean = {name: float(torch.stack(shares).mean()) for name, shares in kept.items()}
    assert mean["exact"] > max(mean["pooled"], mean["window"]), mean
    assert min(mean["pooled"], mean["window"]) > mean["random"], mean
    assert torch.stack(least["adaptive"]).mean() > torch.stack(least["even"]).mean()


@pytest.mark.zoo
@pytest.mark.thorough
def test_exact_search_makes_better_clips_than_chance() -> None:
    original, _ = zoo_sample("scenes-video", count=2)
    quality = []
    for choose in ("exact", "random"):
        plan = f"adaspa(block=16, sparsity=0.7, choose={choose})"
        result, activity = zoo_sample("scenes-video", plan, count=2)
        assert activity["adaspa.pairs_saved"] > 0
        quality.append(db(result, original))
    assert quality[0] > quality[1]
