"""What a search is to raise: rewards of pictures, by name or given as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Reward = Callable[[Tensor, Sequence[str]], Any]
"""Takes (n, 3, height, width) pictures from 0 to 1 and their n prompts; gives n values."""


def colourfulness(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """(n,) how far colours spread in opponent channels (Hasler and Suesstrunk, 2003)."""
    red, green, blue = pictures.float().unbind(1)
    first, second = red - green, 0.5 * (red + green) - blue
    both = torch.stack([first, second]).flatten(2)
    return both.std(dim=-1).norm(dim=0) + 0.3 * both.mean(dim=-1).norm(dim=0)


def contrast(pictures: Tensor, prompts: Sequence[str]) -> Tensor:
    """(n,) standard deviation of brightness."""
    return pictures.float().mean(dim=1).flatten(1).std(dim=1)


def caption(pictures: Tensor, prompts: Sequence[str]) -> list[float]:
    """(n,) how many words the prompt shares with what the exact reader of scenes sees; 0 to 1."""
    from hasten.zoo.scenes.caption import caption as words_of
    from hasten.zoo.scenes.reader import read

    found = [words_of(scene).split() for scene in read(pictures)]
    return [_shared(a, b.split()) for a, b in zip(found, prompts, strict=True)]


def _shared(first: list[str], second: list[str]) -> float:
    """Share of words that two texts have in common, each counted as often as it stands there."""
    left = list(second)
    common = 0
    for word in first:
        if word in left:
            left.remove(word)
            common += 1
    return 2.0 * common / max(1, len(first) + len(second))


REWARDS: dict[str, Reward] = {
    "caption": caption,
    "colourfulness": colourfulness,
    "contrast": contrast,
}
