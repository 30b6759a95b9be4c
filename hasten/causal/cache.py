"""The KV cache of the causal engine: per-layer lengths, per-head selection, original positions.

Every layer owns two preallocated buffers and a table of the original positions of its entries.
A forward pass appends its block to all layers; `commit` then keeps the accepted part of that
block and `rollback` none of it. Evicting techniques shrink one layer at a time with `keep`, which
reallocates, so that the memory is really freed.

A position of -1 marks a hole: padding, or a row that accepted fewer tokens than its neighbours in
the batch. Holes are never attended to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

GROWTH = 64  # entries by which an evicted buffer is longer than what it holds


class Handover(Cache):
    """A transformers `Cache` as models see it: they hand over keys and values, and read an answer.

    It tells them no length; positions are always given.
    """

    def __init__(self, layers: Sequence[Any] = ()) -> None:
        super().__init__(layers=list(layers))  # type: ignore[misc]

    def update(  # type: ignore[override]
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """What models call; see `exchange`."""
        return self.exchange(layer_idx, key_states, value_states)

    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take one layer's (batch, kv_heads, rows, head_dim); return what the pass reads in it."""
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing that a pass needs to know."""
        return 0


class PositionTable:
    """Original positions of cache entries: (batch, heads or 1, capacity), -1 for a hole."""

    def __init__(self, buffer: Tensor, length: int, has_holes: bool) -> None:
        self.buffer = buffer
        self.length = length
        self.has_holes = has_holes

    @property
    def positions(self) -> Tensor:
        """(batch, heads or 1, length) view of the entries in use."""
        return self.buffer[:, :, : self.length]

    def append(self, positions: Tensor, *, has_holes: bool) -> None:
        """Add a block of positions (batch, block), the same for every head."""
        count = positions.shape[1]
        if self.length + count > self.buffer.shape[2]:
            self.buffer = _grown(self.buffer, self.length, self.length + count, dim=2)
        self.buffer[:, :, self.length : self.length + count] = positions[:, None, :]
        self.length += count
        self.has_holes = self.has_holes or has_holes

    def copy(self, rows: Tensor | None = None) -> PositionTable:
        """An independent copy, of the given batch rows if any."""
        buffer = self.buffer.clone() if rows is None else self.buffer.index_select(0, rows)
        return PositionTable(buffer, self.length, self.has_holes)


class LayerCache:
    """Keys and values of one layer: (batch, kv_heads, length, head_dim) each."""

    def __init__(self, table: PositionTable, capacity: int) -> None:
        self.table = table
        self.capacity = capacity
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    # -- views -------------------------------------------------------------------------------
    @property
    def keys(self) -> Tensor:
        """(batch, kv_heads, length, head_dim) view; may be written in place (merging)."""
        assert self._keys is not None, "the layer has not seen a pass yet"
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """(batch, kv_heads, length, head_dim) view; may be written in place (merging)."""
        assert self._values is not None, "the layer has not seen a pass yet"
        return self._values[:, :, : self.length]

    @property
    def positions(self) -> Tensor:
        """(batch, kv_heads or 1, length) original positions, -1 for holes."""
        return self.table.positions

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """The whole key and value buffers, used and unused part alike."""
        assert self._keys is not None and self._values is not None
        return self._keys, self._values

    def num_bytes(self) -> int:
        """Bytes of both buffers, unused part included."""
        if self._keys is None or self._values is None:
            return 0
        return self._keys.nbytes + self._values.nbytes

    # -- writing -----------------------------------------------------------------------------
    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append a block (batch, kv_heads, block, head_dim); return all entries in use."""
        end = self.length + keys.shape[2]
        self.reserve(end, like=(keys, values))
        assert self._keys is not None and self._values is not None
        self._keys[:, :, self.length : end] = keys
        self._values[:, :, self.length : end] = values
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def reserve(self, capacity: int, *, like: tuple[Tensor, Tensor] | None = None) -> None:
        """Make room for `capacity` entries; `like` gives shapes and dtype for the first time."""
        if self._keys is None or self._values is None:
            assert like is not None, "an empty layer needs an example of its keys and values"
            self.capacity = max(self.capacity, capacity)
            self._keys, self._values = (_empty_like(tensor, self.capacity) for tensor in like)
        elif capacity > self._keys.shape[2]:
            self._keys = _grown(self._keys, self.length, capacity, dim=2)
            self._values = _grown(self._values, self.length, capacity, dim=2)

    def keep(self, indices: Tensor) -> None:
        """Keep only some entries and free the memory of the rest.

        Args:
            indices: (batch, kv_heads or 1, kept) entry indices in the order in which they stay
                (ascending keeps the original order); -1 leaves a hole, so that rows and heads may
                keep different numbers.
        """
        keys = self.buffers[0]
        batch, heads, _, _ = keys.shape
        kept = indices.shape[2]
        source = indices.clamp(min=0)
        self._keys = _gathered(self.keys, source.expand(batch, heads, kept), kept + GROWTH)
        self._values = _gathered(self.values, source.expand(batch, heads, kept), kept + GROWTH)
        width = max(self.positions.shape[1], indices.shape[1])  # 1 while all heads hold the same
        positions = self.positions.expand(batch, width, self.length)
        table = positions.gather(2, source.expand(batch, width, kept))
        table = table.masked_fill(indices.expand(batch, width, kept) < 0, -1)
        has_holes = bool((table < 0).any())
        buffer = table.new_full((*table.shape[:2], kept + GROWTH), -1)
        buffer[:, :, :kept] = table
        self.table = PositionTable(buffer, kept, has_holes)
        self.length = kept

    def settle(self, block: int, kept: Tensor | None, num_kept: int) -> None:
        """Keep `kept` (batch, num_kept; -1 pads) of the last `block` entries, None for the first."""
        base = self.length - block
        if kept is not None:
            batch, heads, _, _ = self.buffers[0].shape
            source = (kept.clamp(min=0) + base)[:, None, :].expand(batch, heads, num_kept)
            for buffer in self.buffers:
                index = source[..., None].expand(-1, -1, -1, buffer.shape[3])
                buffer[:, :, base : base + num_kept] = buffer.gather(2, index)
        self.length = base + num_kept

    def copy(self, table: PositionTable, rows: Tensor | None) -> LayerCache:
        """An independent copy with the given table, of the given batch rows if any."""
        twin = LayerCache(table, self.capacity)
        twin.length = self.length
        if self._keys is not None and self._values is not None:
            twin._keys, twin._values = (
                buffer.clone() if rows is None else buffer.index_select(0, rows)
                for buffer in (self._keys, self._values)
            )
        return twin


class KVCache(Handover):
    """The cache of one model in one call; a transformers `Cache`, so models run on it as they are."""

    layers: list[LayerCache]  # type: ignore[assignment]  # transformers' own kinds never stand here

    def __init__(self, num_layers: int, batch: int, capacity: int, device: torch.device) -> None:
        buffer = torch.full((batch, 1, capacity), -1, dtype=torch.long, device=device)
        table = PositionTable(buffer, 0, has_holes=False)
        super().__init__([LayerCache(table, capacity) for _ in range(num_layers)])
        self.batch = batch
        self.block = 0  # entries appended by the pass in flight, not committed yet
        self.kept: Tensor | None = None  # what the last commit kept of its block (see `commit`)

    # -- what models call ----------------------------------------------------------------------
    def exchange(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append a block to one layer and return all its keys and values."""
        return self.layers[layer].update(keys, values)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Entries in use in one layer (not the number of tokens seen, once something is evicted)."""
        return self.layers[layer_idx].length

    # -- what the engine calls -----------------------------------------------------------------
    def tables(self) -> Iterable[PositionTable]:
        """The distinct position tables: one while all layers hold the same entries."""
        return {id(layer.table): layer.table for layer in self.layers}.values()

    def open_block(self, positions: Tensor, *, has_holes: bool) -> None:
        """Announce the positions (batch, block) of the pass that is about to run."""
        assert self.block == 0, "the last pass was neither committed nor rolled back"
        for table in self.tables():
            table.append(positions, has_holes=has_holes)
        self.block = positions.shape[1]

    def commit(self, kept: Tensor | None = None, num_kept: int | None = None) -> None:
        """End the pass in flight and keep some of its block in every layer.

        Args:
            kept: (batch, num_kept) indices into the block, in sequence order, -1 for a hole. None
                keeps the first `num_kept` entries, which moves nothing.
            num_kept: length of the kept part; None keeps the whole block.
        """
        block, self.block, self.kept = self.block, 0, kept
        if kept is not None:
            num_kept = kept.shape[1]
        if num_kept is None or (kept is None and num_kept == block):
            return
        for table in self.tables():
            base = table.length - block
            if kept is not None:
                new = table.buffer[:, :, base : table.length].gather(
                    2, kept.clamp(min=0)[:, None, :].expand(-1, table.buffer.shape[1], -1)
                )
                table.buffer[:, :, base : base + num_kept] = new.masked_fill(
                    kept[:, None, :] < 0, -1
                )
                table.has_holes = table.has_holes or bool((kept < 0).any())
            table.length = base + num_kept
        for layer in self.layers:
            layer.settle(block, kept, num_kept)

    def reopen(self, count: int) -> None:
        """Put the last `count` committed entries in flight again, to keep only some after all.

        Nothing may have been evicted since they were committed.
        """
        assert self.block == 0, "the last pass was neither committed nor rolled back"
        self.block = count

    def rollback(self) -> None:
        """End the pass in flight and keep nothing of it."""
        self.commit(num_kept=0)

    def fork(self, rows: Tensor | None = None) -> KVCache:
        """An independent copy, of the given batch rows (repeats allowed) if any."""
        assert self.block == 0, "cannot fork in the middle of a pass"
        copies = {id(table): table.copy(rows) for table in self.tables()}
        twin = KVCache.__new__(KVCache)
        Cache.__init__(twin, layers=[x.copy(copies[id(x.table)], rows) for x in self.layers])  # type: ignore[misc]
        twin.batch = self.batch if rows is None else int(rows.shape[0])
        twin.block = 0
        twin.kept = None
        return twin

    def num_bytes(self) -> int:
        """Bytes of all buffers as allocated."""
        return sum(layer.num_bytes() for layer in self.layers)

    def num_entries(self) -> int:
        """Entries in use, summed over layers (one entry = one key and value for all heads)."""
        return sum(layer.length for layer in self.layers)


def _empty_like(tensor: Tensor, capacity: int) -> Tensor:
    batch, heads, _, dim = tensor.shape
    # Zeros, not empty: a compiled pass reads the unused part (masked), where a NaN would spread.
    return tensor.new_zeros((batch, heads, capacity, dim))


def _grown(buffer: Tensor, used: int, needed: int, *, dim: int) -> Tensor:
    shape = list(buffer.shape)
    shape[dim] = max(needed + GROWTH, int(shape[dim] * 1.5))
    grown = buffer.new_zeros(shape)
    grown.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return grown


def _gathered(tensor: Tensor, indices: Tensor, capacity: int) -> Tensor:
    """Entries `indices` (batch, heads, kept) of (batch, heads, length, dim), in a fresh buffer."""
    batch, heads, kept = indices.shape
    out = tensor.new_zeros((batch, heads, capacity, tensor.shape[3]))
    index = indices[..., None].expand(-1, -1, -1, tensor.shape[3])
    out[:, :, :kept] = tensor.gather(2, index)
    return out
