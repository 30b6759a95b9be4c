"""What is kept of a text where the model sees blocks: always what a pass over everything says."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import hasten
from hasten.masked.blocks import NEVER, BlockStore, Tree, first_changes
from hasten.masked.denoiser import Denoiser
from hasten.subject import MaskedForm
from tests import models
from tests.techniques.fillers import MASK, filler, prompt, record
from tests.techniques.fillers import NEVER as NO_END

SIZE = 4
LENGTH = 22


def denoiser(shifted: bool, size: int = SIZE) -> Denoiser:
    model = filler(block_length=size, shifted=shifted, sharp=1.0)
    return Denoiser(model, MaskedForm(MASK, shifted, size))


def texts(rows: int, open_from: int, *, seed: int = 0) -> Tensor:
    """Random texts (rows, LENGTH) that are open from a place on."""
    ids = prompt(rows, LENGTH, seed=seed)
    ids[:, open_from:] = MASK
    return ids


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (3, 1)])
def test_a_pass_says_what_a_pass_over_everything_says(
    shifted: bool, padding: tuple[int, int]
) -> None:
    ours, pads = denoiser(shifted), torch.tensor(padding)
    ids = texts(2, 9)
    store, chance = BlockStore(ids, SIZE, pads), torch.Generator().manual_seed(0)
    for step in range(24):
        first = int(torch.randint(7, LENGTH - 1, (), generator=chance))
        wanted = torch.arange(first, min(first + 6, LENGTH))
        said = ours.read(ids, wanted, pads=pads, cache=store).logits
        plain = ours.read(ids, wanted, pads=pads).logits
        torch.testing.assert_close(said, plain, rtol=0, atol=1e-5)
        # Fill a place somewhere, or open one again, anywhere behind the padding.
        row = step % 2
        place = int(torch.randint(padding[row], LENGTH, (), generator=chance))
        ids[row, place] = (
            MASK if step % 3 == 0 else int(torch.randint(2, MASK, (), generator=chance))
        )


def test_a_token_that_changes_makes_stale_what_follows_its_block() -> None:
    ours, ids = denoiser(False), texts(1, 12)
    store = BlockStore(ids, SIZE, torch.tensor([0]))
    assert store.stale(ids) == 0  # nothing was computed
    ours.read(ids, torch.arange(12, 16), cache=store)
    assert store.seen[0, :16].tolist() == ids[0, :16].tolist()
    assert store.seen[0, 16:].tolist() == [NEVER] * 6  # it does not look so far
    assert store.stale(ids) == 16
    for place, first in ((14, 12), (6, 4), (0, 0)):
        moved = ids.clone()
        moved[0, place] = 5 if int(ids[0, place]) != 5 else 6
        assert store.stale(moved) == first
    # Blocks are counted from a row's first token.
    changed = np.arange(LENGTH)[None] == 14
    both = np.stack((changed, np.zeros_like(changed)), axis=1)
    assert first_changes(both, SIZE, np.array([3])) == [11, LENGTH]


@pytest.mark.parametrize("shifted", [False, True])
def test_static_decoding_computes_one_block_a_pass(shifted: bool) -> None:
    model = filler(block_length=SIZE, shifted=shifted)
    with hasten.apply(model) as fast:
        fast.generate(prompt(1, 12), max_new_tokens=12, block_length=SIZE, **NO_END)
        # A shifted model speaks of a block's first place one position earlier.
        narrow = SIZE + shifted
        # A block's first pass computes the last one too, whose last token is new.
        expected = (12 + SIZE) + 3 * narrow + 2 * (2 * SIZE + 3 * narrow)
        assert fast.activity["positions"] == expected
        assert fast.peak_cache_bytes > 0


def nested(ids: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Drafts (rows, count, length), each with one open place more filled, blocks of 8 in order."""
    chance = torch.Generator().manual_seed(seed)
    found = []
    for row in ids:
        places = (row == MASK).nonzero().flatten()
        order = torch.cat([b[torch.randperm(len(b), generator=chance)] for b in places.split(8)])
        draft, drafts = row.clone(), []
        for place in order[:count]:
            draft = draft.clone()
            draft[place] = int(torch.randint(2, MASK, (), generator=chance))
            drafts.append(draft)
        found.append(torch.stack(drafts))
    return torch.stack(found)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("padding", [(0,), (0, 0), (2, 5)])
@pytest.mark.parametrize("open_from", [8, 9, 11])
def test_a_tree_says_what_each_draft_alone_says(
    shifted: bool, padding: tuple[int, ...], open_from: int
) -> None:
    ours, pads, size = denoiser(shifted), torch.tensor(padding), len(padding)
    ids = texts(size, open_from)
    store = BlockStore(ids, SIZE, pads)
    ours.read(ids, torch.arange(open_from, open_from + 4), pads=pads, cache=store)
    drafts = nested(ids, 7)
    ends = [min(open_from + 5 + index, LENGTH) for index in range(7)]
    of_rows, tree, row = ours.drafts(drafts, open_from, ends, store)
    logits = of_rows.logits
    assert row.shape == (7, ends[-1] - open_from) and int(row.max()) + 1 == logits.shape[1]
    for index, end in enumerate(ends):
        wanted = torch.arange(open_from, end)
        plain = ours.read(drafts[:, index], wanted, pads=pads).logits
        said = logits[:, row[index, : len(wanted)]]
        torch.testing.assert_close(said, plain, rtol=0, atol=1e-5)
    # Behind its end speaks the next draft that goes so far.
    for index, place in ((0, 5), (0, 8), (2, 9)):
        speaker = next(draft for draft, end in enumerate(ends) if end > open_from + place)
        assert row[index, place] == row[speaker, place]
    # Rows go on from different drafts, and later passes from what is kept of them.
    best = torch.arange(size) * 3 + 2
    store.adopt(tree, drafts, best)
    now = drafts[torch.arange(size), best]
    assert store.stale(now) >= open_from // SIZE * SIZE
    wanted = torch.arange(open_from, LENGTH)
    said = ours.read(now, wanted, pads=pads, cache=store).logits
    torch.testing.assert_close(said, ours.read(now, wanted, pads=pads).logits, rtol=0, atol=1e-5)


def test_a_tree_computes_what_drafts_share_once() -> None:
    ids = texts(1, 8)
    drafts = torch.stack([ids[0].clone() for _ in range(6)])[None]
    for index, place in enumerate(range(8, 14)):
        drafts[0, index:, place] = 7
    tree = Tree.of(drafts.numpy(), 8, [16] * 6, SIZE, np.zeros(1, dtype=np.int64))
    # Four drafts differ in the first block, so each holds both; two have it from the fourth.
    assert np.bincount(tree.draft).tolist() == [8, 8, 8, 8, 4, 4]
    assert tree.owner[5, :4].tolist() == tree.owner[3, :4].tolist()
    for draft in range(6):
        rows = tree.owner[draft]
        assert tree.columns[rows].tolist() == list(range(8, 16))
        assert tree.tokens[0, rows].tolist() == drafts[0, draft, 8:16].tolist()


@pytest.mark.parametrize("plan", ["saber", "dinfer(cache='none')", "freedave(num_draft=6)"])
@pytest.mark.parametrize("shifted", [False, True])
def test_plans_write_the_same_with_and_without_what_is_kept(
    plan: str, shifted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = filler(block_length=SIZE, shifted=shifted, sharp=8.0)
    rows = models.padded([prompt(1, n, seed=n)[0] for n in (11, 8, 13)])
    settings = {"max_new_tokens": 24, "block_length": 8, **NO_END}

    def written() -> tuple[Tensor, int]:
        with hasten.apply(model, plan) as fast:
            return fast.generate(**rows, **settings), fast.activity["positions"]

    ids, positions = written()
    monkeypatch.setattr("hasten.masked.run.Run._keeps_blocks", lambda run: False)
    whole, every = written()
    assert torch.equal(ids, whole)
    assert positions < every or "dinfer" in plan  # soft embeddings keep nothing


def test_drafts_reach_into_the_next_blocks() -> None:
    # A model that says the same everywhere: every draft holds, so a pass fills as many as it may.
    model = filler(block_length=SIZE, sharp=0.0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with hasten.apply(model, "freedave(num_draft=6)") as fast:
        found = record(fast, prompt(1, 8), 24, block=SIZE)
    filled = [
        int((before == MASK).sum() - (after == MASK).sum())
        for before, after in pairwise([found.before[0], *found.after])
    ]
    assert filled == [6, 6, 6, 6]
