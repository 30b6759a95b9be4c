"""The KV cache alone: appending, committing, rolling back, keeping, forking, growing."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.causal.cache import GROWTH, KVCache


def filled(length: int = 6, *, layers: int = 2, batch: int = 2, heads: int = 2) -> KVCache:
    """A cache whose keys hold 100 * row + 10 * head + entry, and values the negatives."""
    cache = KVCache(layers, batch, 32, torch.device("cpu"))
    append(cache, torch.arange(length).expand(batch, -1), heads)
    cache.commit()
    return cache


def append(cache: KVCache, positions: Tensor, heads: int = 2) -> None:
    batch, block = positions.shape
    start = cache.get_seq_length()
    cache.open_block(positions, has_holes=bool((positions < 0).any()))
    rows = 100.0 * torch.arange(batch)[:, None, None]
    keys = rows + 10.0 * torch.arange(heads)[None, :, None] + torch.arange(start, start + block)
    for index in range(len(cache.layers)):
        cache.update(keys[..., None], -keys[..., None], index)


def entries(cache: KVCache, layer: int = 0, row: int = 0, head: int = 0) -> list[int]:
    return [int(x) for x in cache.layers[layer].keys[row, head, :, 0] - 100 * row - 10 * head]


def test_commit_of_a_prefix_moves_nothing_and_drops_the_rest() -> None:
    cache = filled()
    append(cache, torch.arange(6, 10).expand(2, -1))
    cache.commit(num_kept=3)
    assert entries(cache) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert cache.layers[0].positions[0, 0].tolist() == list(range(9))


def test_commit_of_a_path_gathers_it_in_every_layer_and_row() -> None:
    cache = filled()
    append(cache, torch.tensor([[6, 7, 7, 8], [6, 7, 7, 8]]))
    cache.commit(torch.tensor([[0, 2, 3], [0, 1, -1]]))
    for layer in range(2):
        assert entries(cache, layer, row=0)[6:] == [6, 8, 9]
        assert entries(cache, layer, row=1)[6:8] == [6, 7]
    assert cache.layers[0].positions[1, 0, 6:].tolist() == [6, 7, -1]
    assert all(table.has_holes for table in cache.tables())


def test_rollback_leaves_the_cache_as_it_was() -> None:
    cache = filled()
    before = cache.layers[1].keys.clone()
    append(cache, torch.arange(6, 9).expand(2, -1))
    cache.rollback()
    assert torch.equal(cache.layers[1].keys, before)
    append(cache, torch.arange(6, 7).expand(2, -1))
    cache.commit()
    assert entries(cache)[-1] == 6


def test_keep_frees_memory_and_leaves_other_layers_alone() -> None:
    cache = filled(length=30)
    before = cache.num_bytes()
    cache.layers[0].keep(torch.tensor([[[0, 28, 29]]]).expand(2, 1, 3))
    assert entries(cache, 0) == [0, 28, 29]
    assert entries(cache, 1) == list(range(30))
    assert cache.layers[0].buffers[0].shape[2] == 3 + GROWTH
    assert cache.layers[0].positions[0, 0].tolist() == [0, 28, 29]
    large = KVCache(1, 1, 4096, torch.device("cpu"))
    append(large, torch.arange(4000)[None])
    large.commit()
    full = large.num_bytes()
    large.layers[0].keep(torch.arange(400)[None, None])
    assert large.num_bytes() < 0.15 * full
    assert before > 0


def test_keep_per_head_with_holes_then_append() -> None:
    cache = filled()
    choice = torch.tensor([[[0, 5], [1, -1]]]).expand(2, 2, 2)
    cache.layers[0].keep(choice)
    append(cache, torch.tensor([[6], [6]]))
    cache.commit()
    assert cache.layers[0].positions[0].tolist() == [[0, 5, 6], [1, -1, 6]]
    assert cache.layers[1].positions[0, 0].tolist() == list(range(7))
    # once heads differ, one choice for all heads still means entries, not positions
    cache.layers[0].keep(torch.tensor([[[1, 2]]]).expand(2, 1, 2))
    assert cache.layers[0].positions[0].tolist() == [[5, 6], [-1, 6]]


def test_fork_is_independent_and_may_repeat_rows() -> None:
    cache = filled()
    twin = cache.fork(torch.tensor([1, 1, 0]))
    append(twin, torch.tensor([[6], [6], [6]]))
    twin.commit()
    assert twin.batch == 3
    assert twin.layers[0].length == 7
    assert cache.layers[0].length == 6
    twin.layers[0].keys.zero_()
    assert entries(cache) == [0, 1, 2, 3, 4, 5]


def test_a_cache_grows_past_its_capacity() -> None:
    cache = filled(length=30)
    append(cache, torch.arange(30, 80).expand(2, -1))
    cache.commit()
    assert entries(cache) == list(range(80))
    assert cache.layers[0].positions[0, 0].tolist() == list(range(80))
