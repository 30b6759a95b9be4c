"""Layers inside blocks, by place: attention and feed-forward layers whose output may be reused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hasten.denoise.blocks import blocks, sublayers
from hasten.denoise.network import Call
from hasten.denoise.run import Run

Place = tuple[int, str, int]
"""Block, name of the layer in it, and which of its uses: some run once for the text, once more."""


@dataclass
class Counting:
    """Tells the uses of a layer in one pass of the network apart."""

    call: Call | None = None
    uses: Counter[tuple[int, str]] = field(default_factory=Counter)

    def place(self, run: Run, key: tuple[int, str]) -> Place:
        """Where the use in hand stands."""
        if self.call is not run.call:
            self.begin(run)
        self.uses[key] += 1
        return (*key, self.uses[key] - 1)

    def begin(self, run: Run) -> None:
        """A new pass."""
        self.call = run.call
        self.uses.clear()


def names_of(network: nn.Module) -> list[list[str]]:
    """Names of the layers of each block, in order."""
    return [[name for name, _ in sublayers(block)] for block in blocks(network)]


def to_numbers(places: list[Place], network: nn.Module) -> Tensor:
    """(places, 3) the same in numbers, as they are saved."""
    names = names_of(network)
    return torch.tensor([(block, names[block].index(name), use) for block, name, use in places])


def from_numbers(numbers: Tensor, network: nn.Module) -> list[Place]:
    """The places again."""
    names = names_of(network)
    return [(block, names[block][name], use) for block, name, use in numbers.tolist()]


def each(function: Callable[..., Any], *outputs: Any) -> Any:
    """A layer's output, which may be several tensors, with a function on each of them."""
    if isinstance(outputs[0], tuple):
        return tuple(each(function, *parts) for parts in zip(*outputs, strict=True))
    return None if outputs[0] is None else function(*outputs)
