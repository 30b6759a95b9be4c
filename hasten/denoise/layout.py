"""Which tokens of a transformer's sequence are the sample's, and how they lie in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hasten.denoise.network import Call

Grid = tuple[int, int, int]
"""(frames, height, width)."""


def _not_found(length: int) -> range | None:
    return None


@dataclass(frozen=True)
class Layout:
    """Possible sizes of the sample's token grid; which one it is, its number of tokens says.

    Attributes:
        sizes: (frames, height, width) in the network's input, of each way to read it.
        patch: (frames, height, width) of one token.
        levels: whether the network has smaller grids of the same shape inside, as a U-Net has.
        find: which tokens of a sequence of some length are the sample's, found by looking.
    """

    sizes: tuple[Grid, ...] = ()
    patch: Grid = (1, 1, 1)
    levels: bool = False
    find: Callable[[int], range | None] = field(default=_not_found, compare=False, repr=False)

    @classmethod
    def of(cls, call: Call, find: Callable[[int], range | None] = _not_found) -> Layout:
        """Read it off a network call."""
        patch = (1, 1, 1) if call.x.ndim == 3 else _patch(getattr(call.module, "config", {}))
        return cls(tuple(_sizes(call)), patch, not _has_blocks(call.module), find)

    def grid(self, tokens: int) -> Grid | None:
        """(frames, height, width) in tokens, or None where no reading gives that many tokens.

        A network that attends within single frames has a grid of one frame.
        """
        grids = [
            tuple(math.ceil(n / p) for n, p in zip(size, self.patch, strict=True))
            for size in self.sizes
        ]
        for grid in [*grids, *((1, *grid[1:]) for grid in grids)]:
            if math.prod(grid) == tokens:
                return grid  # type: ignore[return-value]
        for _, height, width in self.sizes if self.levels else ():
            rows = round(math.sqrt(tokens * height / width))
            if rows and tokens % rows == 0 and tokens // rows == rows * width // height:
                return 1, rows, tokens // rows
        return None

    def offset(self, length: int) -> int | None:
        """How many tokens come before the sample's in a sequence that an attention layer reads.

        None where that is not known, or not the same for all rows.
        """
        place = self.place(length)
        return None if place is None else place[0]

    def place(self, length: int) -> tuple[int, Grid] | None:
        """The offset of the sample's tokens in a sequence of the sample's and the text's, and their grid."""
        grid = self.grid(length)
        if grid is not None:
            return 0, grid
        found = self.find(length)
        grid = None if found is None else self.grid(len(found))
        return None if found is None or grid is None else (found.start, grid)


def _has_blocks(module: nn.Module) -> bool:
    from hasten.denoise.blocks import blocks

    return bool(blocks(module))


def _sizes(call: Call) -> Iterator[Grid]:
    x, given = call.x, call.kwargs
    if x.ndim == 4:
        yield 1, x.shape[2], x.shape[3]
    elif x.ndim == 5:
        yield x.shape[2], x.shape[3], x.shape[4]  # channels before frames
        yield x.shape[1], x.shape[3], x.shape[4]  # frames before channels
        if "in_visual_dim" in getattr(call.module, "config", {}):  # as Kandinsky's networks say
            yield x.shape[1], x.shape[2], x.shape[3]  # channels last
    elif x.ndim == 3:  # already cut into tokens
        if isinstance(given.get("height"), int):
            yield int(given.get("num_frames") or 1), given["height"], given["width"]
        ids = given.get("img_ids")
        if isinstance(ids, Tensor):  # (..., tokens, axes): time or kind, row, column, maybe more
            last = ids.reshape(-1, ids.shape[-1])[: own_tokens(call)].amax(dim=0)
            yield 1, int(last[1]) + 1, int(last[2]) + 1
        shapes = given.get("img_shapes")
        if shapes:
            first = shapes[0]
            yield tuple(first[0] if isinstance(first, list) else first)


def own_tokens(call: Call) -> int:
    """How many of the tokens that a network is given are the sample's.

    Where a picture is edited, the tokens of the one that is shown stand behind them, numbered as of
    another kind or with a shape of their own.
    """
    ids, shapes = call.kwargs.get("img_ids"), call.kwargs.get("img_shapes")
    tokens = call.x.shape[1]
    if isinstance(ids, Tensor):
        kinds = ids.reshape(-1, ids.shape[-1])[:tokens, 0]
        others = (kinds != kinds[0]).nonzero()
        return int(others[0, 0]) if len(others) else tokens
    if shapes and isinstance(shapes[0], list):
        return min(tokens, math.prod(shapes[0][0]))
    return tokens


def _patch(config: Any) -> Grid:
    size = config.get("patch_size") or config.get("all_patch_size", (1,))[0]
    if isinstance(size, (list, tuple)):
        return tuple(size) if len(size) == 3 else (1, *size)  # type: ignore[return-value]
    return int(config.get("patch_size_t") or 1), int(size), int(size)


def cells(grid: Grid) -> Iterator[Grid]:
    """All places of a grid in the order of its tokens."""
    yield from product(*(range(n) for n in grid))


# ---------------------------------------------------------------------- where the sample's tokens are
class _HeardError(Exception):
    """Ends a forward pass of which no more is needed."""


class _Listening(TorchFunctionMode):
    """Ends a forward pass at its first self-attention over a sequence of some length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.key: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {**dict(zip(("query", "key"), args, strict=False)), **(kwargs or {})}
        if func is F.scaled_dot_product_attention and self._fits(given["query"], given["key"]):
            self.key = given["key"]
            raise _HeardError
        return func(*args, **(kwargs or {}))

    def _fits(self, query: Tensor, key: Tensor) -> bool:
        return query.shape[-2] == key.shape[-2] == self.length


def sample_tokens(forward: Callable[..., Any], call: Call, length: int) -> range | None:
    """Which tokens are the sample's in a sequence of some length that the network attends over.

    Before the first such attention the sample has changed no other token. So the network runs up
    to there with the sample and with another one, and those keys that differ are the sample's.
    """
    keys, other = [], 1.5 - 2.0 * call.x
    if call.x.ndim == 3:
        own = own_tokens(call)
        other = torch.cat([other[:, :own], call.x[:, own:]], dim=1)
    for x in (call.x, other):
        again = Call(call.module, (), dict(call.kwargs), call.branch)
        again.x = x
        listening = _Listening(length)
        try:
            with listening:
                forward(**again.kwargs)
        except _HeardError:
            assert listening.key is not None
            keys.append(listening.key)
    if len(keys) < 2:
        return None
    differ = (keys[0] != keys[1]).any(dim=-1).any(dim=1)  # (rows, length)
    places = differ[0].nonzero()[:, 0].tolist()
    if not places or not bool((differ == differ[0]).all()):
        return None
    found = range(places[0], places[-1] + 1)
    return found if len(found) == len(places) else None
