"""Which tokens of a transformer's sequence are the sample's, and how they lie in it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Tensor

from hasten.denoise.network import Call


@dataclass(frozen=True)
class Layout:
    """Possible sizes of the sample's token grid; which one it is, its number of tokens says.

    Attributes:
        sizes: (frames, height, width) in the network's input, of each way to read it.
        patch: (frames, height, width) of one token.
    """

    sizes: tuple[tuple[int, int, int], ...] = ()
    patch: tuple[int, int, int] = (1, 1, 1)

    @classmethod
    def of(cls, call: Call) -> Layout:
        """Read it off a network call."""
        sizes = tuple(_sizes(call))
        return cls(sizes, _patch(getattr(call.module, "config", {})))

    def grid(self, tokens: int) -> tuple[int, int, int] | None:
        """(frames, height, width) in tokens, or None where no reading gives that many tokens."""
        for size in self.sizes:
            grid = tuple(math.ceil(n / p) for n, p in zip(size, self.patch, strict=True))
            if math.prod(grid) == tokens:
                return grid  # type: ignore[return-value]
        for frames, height, width in self.sizes:  # a level of a U-Net: the same shape, smaller
            side = math.sqrt(tokens * height / (frames * width)) if width else 0.0
            rows = round(side)
            if (
                frames == 1
                and rows
                and tokens % rows == 0
                and tokens // rows == rows * width // height
            ):
                return 1, rows, tokens // rows
        return None


def _sizes(call: Call) -> Iterator[tuple[int, int, int]]:
    x, given = call.x, call.kwargs
    if x.ndim == 4:
        yield 1, x.shape[2], x.shape[3]
    elif x.ndim == 5:
        yield x.shape[2], x.shape[3], x.shape[4]  # channels before frames
        yield x.shape[1], x.shape[3], x.shape[4]  # frames before channels
    elif x.ndim == 3:  # already cut into tokens
        if isinstance(given.get("height"), int):
            yield int(given.get("num_frames") or 1), given["height"], given["width"]
        ids = given.get("img_ids")
        if isinstance(ids, Tensor):
            last = ids.reshape(-1, ids.shape[-1]).amax(dim=0)
            yield 1, int(last[-2]) + 1, int(last[-1]) + 1
        shapes = given.get("img_shapes")
        if shapes:
            first = shapes[0]
            yield tuple(first[0] if isinstance(first, list) else first)


def _patch(config: Any) -> tuple[int, int, int]:
    size = config.get("patch_size") if hasattr(config, "get") else None
    if isinstance(size, (list, tuple)):
        return tuple(size) if len(size) == 3 else (1, *size)  # type: ignore[return-value]
    frames = config.get("patch_size_t") if hasattr(config, "get") else None
    return int(frames or 1), int(size or 1), int(size or 1)


def cells(grid: tuple[int, int, int]) -> Iterator[tuple[int, int, int]]:
    """All places of a grid in the order of its tokens."""
    yield from product(*(range(n) for n in grid))
