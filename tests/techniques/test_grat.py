"""GRAT: cells, patterns, and attention that reads by them, beside its definition with a mask."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import hasten
from hasten.denoise.attention import sparse
from hasten.denoise.attention.masses import search
from hasten.denoise.attention.patterns import Patterned, reads_of, visible
from hasten.denoise.attention.sparse import Cells
from tests.pipelines import call, picture, tiny
from tests.techniques.attending import (
    CPU,
    attention_call,
    masked_dense,
    run_attention,
    seen_tokens,
)
from tests.techniques.denoising import db, made, own, zoo_sample

LARGE = {"height": 32, "width": 32}  # 64 tokens and more in the tiny pipelines


# ------------------------------------------------------------------------------------------- cells
def test_tokens_are_put_in_the_order_of_their_cells() -> None:
    cells = Cells.of((2, 4, 6), (1, 2, 3), CPU)
    order = [
        (t * 4 + h * 2 + i) * 6 + w * 3 + j
        for t, h, w in product(range(2), range(2), range(2))
        for i, j in product(range(2), range(3))
    ]
    assert cells.order.tolist() == order and cells.valid is None
    assert cells.places.tolist() == [list(p) for p in product(range(2), range(2), range(2))]


@pytest.mark.parametrize("grid", [(1, 8, 8), (3, 5, 7), (1, 1, 1), (2, 9, 4)])
def test_there_and_back_is_the_identity(grid: tuple[int, int, int]) -> None:
    cells = Cells.of(grid, (2, 4, 3), CPU)
    tokens = torch.randn(5, grid[0] * grid[1] * grid[2], 3)
    assert torch.equal(cells.join(cells.split(tokens)), tokens)
    if cells.valid is not None:
        assert int(cells.valid.sum()) == tokens.shape[1]


# ---------------------------------------------------------------------------------------- patterns
def test_a_cross_is_the_same_row_column_or_frames() -> None:
    places = Cells.of((4, 6, 6), (2, 2, 2), CPU).places
    seen = visible(places, "criss_cross", 0)
    for i, j in product(range(len(places)), repeat=2):
        assert bool(seen[i, j]) == any(a == b for a, b in zip(places[i], places[j], strict=True))
    picture_places = Cells.of((1, 6, 8), (1, 2, 2), CPU).places
    assert visible(picture_places, "criss_cross", 0).sum(dim=1).tolist() == [3 + 4 - 1] * 12


def test_surroundings_are_cells_within_the_radius() -> None:
    places = Cells.of((1, 10, 10), (1, 2, 2), CPU).places
    for radius in (0, 1, 2):
        seen = visible(places, "surrounding", radius)
        far = (places[:, None] - places[None]).abs().amax(dim=-1)
        assert torch.equal(seen, far <= radius)
        assert int(seen[12].sum()) == min(25, (2 * radius + 1) ** 2)  # the cell in the middle


# --------------------------------------------------------------------------------------- attention
CALLS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "picture": ((1, 8, 8), {}),
    "clip": ((4, 4, 6), {}),
    "padded": ((1, 9, 11), {}),
    "text behind": ((1, 8, 6), {"behind": 5}),
    "text before": ((1, 8, 6), {"before": 5, "scale": 0.5}),
    "shared keys": ((1, 6, 6), {"before": 3, "key_heads": 2, "enable_gqa": True}),
}


def text_mask(call_of: str, length: int, *, batch: int = 2) -> torch.Tensor:
    """(batch, 1, 1, length) the last of the text's tokens is padding in the first row."""
    before = CALLS[call_of][1].get("before", 0)
    mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
    mask[0, ..., before - 1 if before else length - 1] = False
    return mask


@pytest.mark.parametrize("gathered", [sparse.GATHERED, 500])
@pytest.mark.parametrize("pattern", ["criss_cross", "surrounding"])
@pytest.mark.parametrize("of", CALLS)
def test_gathering_is_dense_attention_with_a_mask(
    of: str, pattern: str, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "GATHERED", gathered)  # in few or in many pieces
    grid, how = CALLS[of]
    text = {side: how.get(side, 0) for side in ("before", "behind")}
    tokens = grid[0] * grid[1] * grid[2]
    cells = Cells.of(grid, (2, 2, 2), CPU)
    seen = visible(cells.places, pattern, 1)
    for masked in (False, True) if sum(text.values()) else (False,):
        mask = text_mask(of, tokens + sum(text.values())) if masked else None
        attention = attention_call(tokens, mask=mask, **how)
        expected = masked_dense(attention, seen_tokens(cells, seen, **text))
        reads = reads_of(seen, CPU)
        result, counted = run_attention(attention, cells, reads, before=text["before"])
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
        assert counted["x.pairs_saved"] > 0


@pytest.mark.parametrize("form", ["float", "rows"])
def test_masks_in_other_forms(form: str) -> None:
    cells, tokens, text = Cells.of((1, 8, 6), (1, 2, 2), CPU), 48, 5
    mask = text_mask("text behind", tokens + text)
    if form == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -5.0)
    else:  # padding of the text as an outer product, as some networks make it
        mask = mask | torch.zeros(1, 1, tokens + text, 1, dtype=torch.bool)
        mask[:, :, tokens:] = True
    attention = attention_call(tokens, behind=text, mask=mask)
    seen = visible(cells.places, "criss_cross", 0)
    expected = masked_dense(attention, seen_tokens(cells, seen, behind=text))
    result, counted = run_attention(attention, cells, reads_of(seen, CPU))
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
    assert counted["x.pairs"] > 0


def test_a_mask_over_the_sample_itself_is_left_to_the_network() -> None:
    mask = torch.ones(48, 48, dtype=torch.bool).tril()
    attention = attention_call(48, mask=mask)
    cells = Cells.of((1, 8, 6), (1, 2, 2), CPU)
    reads = reads_of(visible(cells.places, "criss_cross", 0), CPU)
    result, counted = run_attention(attention, cells, reads)
    assert torch.equal(result, attention.dense()) and not counted


@pytest.mark.parametrize("cell", [(1, 8, 8), (1, 2, 4)])
def test_reading_every_cell_is_dense(cell: tuple[int, int, int]) -> None:
    attention = attention_call(64, behind=4)
    cells = Cells.of((1, 8, 8), cell, CPU)
    seen = visible(cells.places, "surrounding", 8)
    assert bool(seen.all())
    parts = sparse.Sequences.of(attention, cells, 0)
    assert parts is not None
    got = parts.read(reads_of(seen, CPU)[0])
    result = sparse.whole(attention, got, cells, 0)
    torch.testing.assert_close(result, attention.dense(), atol=1e-6, rtol=1e-5)


def test_text_queries_read_everything() -> None:
    attention = attention_call(64, behind=6)
    cells = Cells.of((1, 8, 8), (1, 2, 2), CPU)
    result, _ = run_attention(
        attention, cells, reads_of(visible(cells.places, "criss_cross", 0), CPU)
    )
    torch.testing.assert_close(result[:, :, 64:], attention.dense()[:, :, 64:], atol=1e-6, rtol=0)
    assert not torch.allclose(result[:, :, :64], attention.dense()[:, :, :64], atol=1e-3)


def test_a_cell_hears_of_those_that_it_sees_and_of_no_other() -> None:
    cells = Cells.of((1, 8, 8), (1, 2, 2), CPU)
    seen = visible(cells.places, "surrounding", 1)
    reads, attention = reads_of(seen, CPU), attention_call(64)
    before, _ = run_attention(attention, cells, reads)
    token = 3 * 8 + 5
    for name in ("key", "value"):
        attention.arguments[name][:, :, token] += 1.0
    after, _ = run_attention(attention, cells, reads)
    cell = cells.inverse // cells.size
    changed = (after != before).any(dim=-1).any(dim=1)
    assert torch.equal(changed, seen[cell, cell[token]].expand(2, -1))


def test_pairs_are_counted_by_the_formula_and_really_not_computed() -> None:
    attention = attention_call(256, batch=1, heads=2, behind=10)
    cells = Cells.of((1, 16, 16), (1, 4, 4), CPU)
    reads = reads_of(visible(cells.places, "criss_cross", 0), CPU)
    _, counted = run_attention(attention, cells, reads)
    pairs = 2 * (256 * (16 * (4 + 4 - 1) + 10) + 10 * 266)  # n (G_h + G_w - 1) keys of a query
    assert counted == {"x.pairs": pairs, "x.pairs_saved": 2 * 266 * 266 - pairs}
    work = []
    for compute in (attention.dense, lambda: run_attention(attention, cells, reads)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            compute()
        work.append(flops.get_total_flops())
    assert work[1] / work[0] == pytest.approx(pairs / (2 * 266 * 266), rel=1e-6)


# --------------------------------------------------------------------------------------- pipelines
NEUTRAL = "grat(pattern=surrounding, radius=1000)"


@pytest.mark.parametrize("plan", [NEUTRAL, "grat(cell=64, cell_frames=64)", "grat(dense_steps=50)"])
def test_nothing_left_out_is_the_original_bit_for_bit(plan: str) -> None:
    pipe = tiny("pixart")
    result, activity = made(pipe, "pixart", plan, **LARGE)
    assert torch.equal(result, picture(pipe(**call("pixart", **LARGE))))
    assert not own(activity, "grat")


@pytest.mark.parametrize("family", ["flux", "cogview4", "ltx", "unet"])
def test_gathering_everything_is_the_original(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions are applied in the tokens' own order, and the output is put back into it."""
    pipe = tiny(family)
    original = picture(pipe(**call(family, num_inference_steps=2)))
    taken = []

    def everything(self: Patterned, state: Any, run: Any, attention: Any) -> torch.Tensor:
        start, grid = run.layout.place(attention.query.shape[2])
        cells = Cells.of(grid, (2, 3, 2), CPU)
        parts = sparse.Sequences.of(attention, cells, start)
        taken.append(cells.count)
        seen = torch.ones(cells.count, cells.count, dtype=torch.bool)
        return sparse.whole(attention, parts.read(reads_of(seen, CPU)[0]), cells, start)

    monkeypatch.setattr(Patterned, "attend", everything)
    result, _ = made(pipe, family, "grat", num_inference_steps=2)
    assert max(taken) > 1
    torch.testing.assert_close(result, original, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["sd3", "flux", "unet"])
def test_on_is_on(family: str) -> None:
    pipe = tiny(family)
    original = picture(pipe(**call(family, **LARGE)))
    with hasten.apply(pipe, "grat(cell=2)") as fast:
        result = picture(fast(**call(family, **LARGE)))
        counted = own(fast.activity, "grat")
        assert counted["grat.pairs"] > 0 and counted["grat.pairs_saved"] > 0
        assert torch.isfinite(result).all() and not torch.equal(result, original)
        small = picture(fast(**call(family)))  # another size: other cells
        assert torch.isfinite(small).all()
        assert torch.equal(picture(fast(**call(family, **LARGE))), result)


def test_steps_at_the_start_may_be_dense() -> None:
    pipe = tiny("pixart")
    most = made(pipe, "pixart", "grat(cell=2)", **LARGE)[1]["grat.pairs"]
    half = made(pipe, "pixart", "grat(cell=2, dense_steps=25)", **LARGE)[1]["grat.pairs"]
    assert most == 2 * half


def test_bfloat16() -> None:
    pipe = tiny("pixart", dtype=torch.bfloat16)
    result, activity = made(pipe, "pixart", "grat(cell=2)", **LARGE)
    assert torch.isfinite(result.float()).all() and activity["grat.pairs"] > 0


# --------------------------------------------------------------------------------------- the zoo
@pytest.mark.zoo
@pytest.mark.thorough
@pytest.mark.parametrize("pattern", ["criss_cross", "surrounding"])
def test_cells_nearby_keep_more_of_the_softmax_than_random_ones(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, list[float]] = {"grat": [], "random_key_blocks": []}

    def noted(self: Patterned, state: Any, run: Any, attention: Any) -> torch.Tensor:
        start, grid = run.layout.place(attention.query.shape[2])
        cells = Cells.of(grid, (self.cell_frames, self.cell, self.cell), CPU)
        parts = sparse.Sequences.of(attention, cells, start)
        found = search(parts, cells)
        seen = self.seen(cells.places)
        mass = (found.blocks * seen).sum(dim=-1) + found.text
        kept[self.name].append(float((mass / cells.size).mean()))
        return attention.dense()

    monkeypatch.setattr(Patterned, "attend", noted)
    for name in kept:
        zoo_sample("scenes-dit", f"{name}(cell=4, pattern={pattern})", steps=5, count=2)
    ours, chance = (sum(values) / len(values) for values in kept.values())
    assert ours > chance + 0.05


@pytest.mark.zoo
@pytest.mark.thorough
def test_pictures_stay_nearer_than_with_random_cells() -> None:
    original, _ = zoo_sample("scenes-dit")
    quality = [
        db(zoo_sample("scenes-dit", f"{name}(cell=4)")[0], original)
        for name in ("grat", "random_key_blocks")
    ]
    assert quality[0] > quality[1]
