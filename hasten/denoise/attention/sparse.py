"""Block-sparse attention without a mask: each cell of queries gathers the key cells that it reads.

The sample's tokens are cut into cells, the same number of tokens in each. A query cell reads some key
cells and all of the text; the text reads everything. What is not read is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.denoise.blocks import AttentionCall
from hasten.denoise.run import Run

GATHERED = 2**24  # numbers of gathered keys at a time; more gains nothing and takes memory


@dataclass(frozen=True)
class Cells:
    """How tokens are cut into cells.

    Attributes:
        places: (cells, axes) which cell it is along each axis.
        order: (cells * size,) the token at each place of each cell; any where the cell is not full.
        inverse: (tokens,) where each token stands in `order`.
        valid: (cells, size) whether there is a token; None where all cells are full.
    """

    places: Tensor
    order: Tensor
    inverse: Tensor
    valid: Tensor | None

    @classmethod
    def of(cls, grid: Sequence[int], cell: Sequence[int], device: torch.device) -> Cells:
        """Cut a grid of tokens, in row-major order, into cells of a size; those at the end are padded."""
        cell = [min(c, g) for c, g in zip(cell, grid, strict=True)]
        counts = [math.ceil(g / c) for g, c in zip(grid, cell, strict=True)]
        padded = [n * c for n, c in zip(counts, cell, strict=True)]
        tokens = torch.full(padded, -1, dtype=torch.long)
        tokens[tuple(slice(g) for g in grid)] = torch.arange(math.prod(grid)).view(*grid)
        # (t', p_t, h', p_h, w', p_w) -> (t', h', w', p_t, p_h, p_w)
        split = tokens.view(*[n for pair in zip(counts, cell, strict=True) for n in pair])
        axes = len(counts)
        order = split.permute(*range(0, 2 * axes, 2), *range(1, 2 * axes, 2)).flatten()
        valid = order >= 0
        inverse = torch.empty(math.prod(grid), dtype=torch.long)
        inverse[order[valid]] = torch.arange(len(order))[valid]
        places = torch.tensor(list(product(*(range(n) for n in counts))))
        whole = bool(valid.all())
        size = (math.prod(counts), math.prod(cell))
        return cls(
            places,
            order.clamp(min=0).to(device),
            inverse.to(device),
            None if whole else valid.view(size).to(device),
        )

    @property
    def count(self) -> int:
        """How many cells."""
        return len(self.places)

    @property
    def size(self) -> int:
        """Tokens of a cell, padding counted."""
        return len(self.order) // self.count

    def split(self, tokens: Tensor) -> Tensor:
        """(items, tokens, ...) as (items, cells, size, ...)."""
        return tokens.index_select(1, self.order).unflatten(1, (self.count, self.size))

    def join(self, cells: Tensor) -> Tensor:
        """The tokens again, in their own order."""
        return cells.flatten(1, 2).index_select(1, self.inverse)


@dataclass(frozen=True)
class Reads:
    """Which key cells some query cells read.

    Attributes:
        keys: (items or 1, query cells, read) key cells.
        items: (items,) of batch and heads, flattened; None for all.
        cells: (query cells,); None for all.
    """

    keys: Tensor
    items: Tensor | None = None
    cells: Tensor | None = None


@dataclass(frozen=True)
class Sequences:
    """An attention's tensors, batch and heads flattened into items, sample and text apart.

    Attributes:
        query, key, value: (items, cells, size, head_dim) of the sample.
        text_key, text_value: (items, text, head_dim).
        bias: (items, cells, size) added to the scores of a key; None for nothing.
        text_bias: (items, text) likewise.
        scale: of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text_key: Tensor
    text_value: Tensor
    bias: Tensor | None
    text_bias: Tensor | None
    scale: float

    @classmethod
    def of(cls, call: AttentionCall, cells: Cells, start: int) -> Sequences | None:
        """Take an attention call apart; None where its mask is not the same for all queries."""
        query, tokens = call.query, len(cells.inverse)
        key, value = (_spread(t, query.shape[1]) for t in (call.key, call.value))
        sample = slice(start, start + tokens)
        query, key, value = (t.flatten(0, 1) for t in (query, key, value))
        bias = text_bias = None
        if call.mask is not None:
            columns = _columns(call.mask, call.query, sample)
            if columns is None:
                return None
            bias, text_bias = cells.split(columns[:, sample]), without(columns, start, tokens)
        if cells.valid is not None:
            padding = torch.zeros(cells.valid.shape, dtype=query.dtype, device=query.device)
            padding.masked_fill_(~cells.valid, -math.inf)
            bias = (padding if bias is None else bias + padding).expand(len(query), -1, -1)
        scale = call.arguments.get("scale")
        return cls(
            cells.split(query[:, sample]),
            cells.split(key[:, sample]),
            cells.split(value[:, sample]),
            without(key, start, tokens),
            without(value, start, tokens),
            bias,
            text_bias,
            query.shape[-1] ** -0.5 if scale is None else float(scale),
        )

    def read(self, reads: Reads) -> Tensor:
        """(items, query cells, size, head_dim) what some query cells get of the keys that they read."""
        query = _some(self.query, reads.items)
        query = query if reads.cells is None else query[:, reads.cells]
        keys = reads.keys.long().expand(len(query), -1, -1)
        read = keys.shape[-1] * self.key.shape[2] * self.key.shape[3] * len(query)
        step = max(1, GATHERED // max(1, read))
        parts = [
            self._attend(reads.items, query[:, at : at + step], keys[:, at : at + step])
            for at in range(0, query.shape[1], step)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _attend(self, items: Tensor | None, query: Tensor, keys: Tensor) -> Tensor:
        number, cells = query.shape[:2]
        first = torch.arange(number, device=keys.device)[:, None, None] * self.key.shape[1]
        rows = (keys + first).flatten()

        def gathered(cells_of: Tensor, text: Tensor) -> Tensor:
            taken = _some(cells_of, items).flatten(0, 1).index_select(0, rows)
            taken = taken.unflatten(0, keys.shape).flatten(2, 3)
            if not text.shape[1]:
                return taken
            read = _some(text, items)[:, None].expand(-1, cells, *text.shape[1:])
            return torch.cat([taken, read], dim=2)

        bias = None
        if self.bias is not None:
            text = self.text_bias
            if text is None:
                text = self.bias.new_zeros(self.text_key.shape[:2])
            bias = gathered(self.bias, text)[:, :, None]
        key, value = gathered(self.key, self.text_key), gathered(self.value, self.text_value)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=self.scale)


def _some(tensor: Tensor, items: Tensor | None) -> Tensor:
    return tensor if items is None else tensor.index_select(0, items)


def attend(
    run: Run, name: str, call: AttentionCall, cells: Cells, start: int, reads: Collection[Reads]
) -> Tensor:
    """(batch, heads, length, head_dim) attention that reads what `reads` says, and all of the text.

    Counts "pairs", those of a query and a key that were computed, and "pairs_saved", those that dense
    attention would have computed beyond them. Where that is nothing, because of padding, it is dense.

    Args:
        start: where the sample's tokens begin; what stands before and behind is text.
    """
    batch, heads, length, _ = call.query.shape
    text, dense = length - len(cells.inverse), batch * heads * length * length
    pairs = batch * heads * text * length
    for some in reads:
        items = batch * heads if some.items is None else len(some.items)
        queries = items * some.keys.shape[1] * cells.size
        pairs += queries * (some.keys.shape[2] * cells.size + text)
    parts = Sequences.of(call, cells, start) if pairs < dense else None
    if parts is None:
        return call.dense()
    out = torch.empty_like(parts.query)
    for some in reads:
        made = parts.read(some)
        if some.items is not None:
            out[some.items] = made
        elif some.cells is not None:
            out[:, some.cells] = made
        else:
            out = made
    run.activity[f"{name}.pairs"] += pairs
    run.activity[f"{name}.pairs_saved"] += dense - pairs
    return whole(call, out, cells, start)


def whole(call: AttentionCall, sample: Tensor, cells: Cells, start: int) -> Tensor:
    """(batch, heads, length, head_dim) the sample's attention with that of the text around it.

    Args:
        sample: (items, cells, size, head_dim).
    """
    made = cells.join(sample).unflatten(0, call.query.shape[:2])
    end = start + len(cells.inverse)
    before, behind = (_text_queries(call, rows) for rows in (slice(0, start), slice(end, None)))
    return torch.cat([part for part in (before, made, behind) if part is not None], dim=2)


def _text_queries(call: AttentionCall, rows: slice) -> Tensor | None:
    """Attention of some of the text to everything; None where there is none."""
    query, mask = call.query[:, :, rows], call.mask
    if not query.shape[2]:
        return None
    if mask is not None and mask.ndim > 1 and mask.shape[-2] > 1:
        mask = mask[..., rows, :]
    given = {**call.arguments, "query": query, "attn_mask": mask}
    return F.scaled_dot_product_attention(**given)


def without(tensor: Tensor, start: int, tokens: int) -> Tensor:
    """(items, text, ...) what stands before and behind the sample's tokens."""
    if not start:
        return tensor[:, tokens:]
    return torch.cat([tensor[:, :start], tensor[:, start + tokens :]], dim=1)


def _spread(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values of all heads, where several share one."""
    return (
        tensor.repeat_interleave(heads // tensor.shape[1], 1)
        if tensor.shape[1] != heads
        else tensor
    )


def _columns(mask: Tensor, query: Tensor, sample: slice) -> Tensor | None:
    """(items, length) what a mask adds to the scores of each key, for the sample's queries.

    None where it is not the same for all of them, as padding of the text is.
    """
    rows = mask.reshape(*[1] * (4 - mask.ndim), *mask.shape)
    rows = rows[:, :, sample] if rows.shape[2] > 1 else rows
    first = rows[:, :, :1]
    if rows.shape[2] > 1 and not torch.equal(rows, first.expand_as(rows)):
        return None
    if first.dtype == torch.bool:
        first = torch.zeros(first.shape, dtype=query.dtype, device=query.device).masked_fill_(
            ~first, -math.inf
        )
    return first[:, :, 0].expand(*query.shape[:2], -1).flatten(0, 1)
