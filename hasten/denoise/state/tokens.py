"""A sample as a grid of tokens, and a network's blocks run on some of those tokens only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hasten.denoise.blocks import BlockCall, blocks
from hasten.denoise.network import networks
from hasten.errors import SubjectError

_OF_TOKENS = ("rot", "freq", "pos_emb", "mask", "_ids")  # in names of what has an entry a token
_OF_TEXT = ("encoder", "text", "txt", "cap")  # begins names of what is about the text's tokens
MODULATION = 6  # shift, scale and gate of two layers
_OF_TIME = ("temb", "timestep_proj", "timestep")  # have one only where each token has its own time


@dataclass(frozen=True)
class View:
    """How a sample is cut into tokens.

    Attributes:
        grid: (frames, height, width) in tokens.
        frames_first: whether clips have frames before channels.
    """

    grid: tuple[int, int, int]
    frames_first: bool = False

    @property
    def count(self) -> int:
        """How many tokens there are."""
        frames, height, width = self.grid
        return frames * height * width

    def fits(self, x: Tensor) -> bool:
        """Whether a sample, of any layout, has these tokens."""
        if x.ndim == 3:
            return x.shape[1] == self.count
        frames = () if x.ndim == 4 else (x.shape[1 if self.frames_first else 2],)
        places = zip((*frames, *x.shape[-2:]), self.grid[5 - x.ndim :], strict=True)
        return all(place % cells == 0 for place, cells in places)

    def tokens(self, x: Tensor) -> Tensor:
        """(batch, frames, height, width, values) all values of each token, of a sample of any layout."""
        f, h, w = self.grid
        if x.ndim == 3:
            return x.reshape(len(x), f, h, w, -1)
        x = x.unsqueeze(2) if x.ndim == 4 else x.transpose(1, 2) if self.frames_first else x
        b, c, frames, height, width = x.shape
        cut = x.reshape(b, c, f, frames // f, h, height // h, w, width // w)
        return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, f, h, w, -1)

    def sample(self, tokens: Tensor, like: Tensor) -> Tensor:
        """What `tokens` came from: the inverse, in the layout of `like`."""
        if like.ndim == 3:
            return tokens.reshape(like.shape)
        f, h, w = self.grid
        x = (
            like.unsqueeze(2)
            if like.ndim == 4
            else like.transpose(1, 2)
            if self.frames_first
            else like
        )
        b, c, frames, height, width = x.shape
        cut = tokens.reshape(b, f, h, w, c, frames // f, height // h, width // w)
        x = cut.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, c, frames, height, width)
        if like.ndim == 4:
            return x.squeeze(2)
        return x.transpose(1, 2) if self.frames_first else x


def has_frames_first(x: Tensor, module: nn.Module) -> bool:
    """Whether a clip has its frames before its channels, as the network's config tells them apart."""
    if x.ndim != 5:
        return False
    channels = getattr(module, "config", {}).get("in_channels")
    if x.shape[1] == x.shape[2]:
        return type(module).__name__.startswith("CogVideoX")
    return bool(x.shape[2] == channels)


class Subset:
    """Runs a network's blocks on some of the sample's tokens, with their true positions.

    Attributes:
        kept: (kept,) the tokens, in ascending order.
        nearest: (tokens,) for each token the place in `kept` that stands for it after the blocks.
        who: the technique that errors speak of.
    """

    def __init__(self, kept: Tensor, nearest: Tensor, who: str = "The plan") -> None:
        self.kept = kept
        self.nearest = nearest
        self.who = who
        self._last: Tensor | None = None
        self._text_first = True

    def run(self, call: BlockCall) -> Any:
        """A block's output; tokens are left out before the first block and back after the last."""
        kept, total = self.kept.to(call.hidden.device), len(self.nearest)
        if call.index == 0:
            if call.hidden.shape[1] != total:
                raise SubjectError(
                    f"{self.who}: the blocks of {type(call.module).__name__} are given {call.hidden.shape[1]} tokens and the "
                    f"sample has {total}, so its tokens cannot be told from others."
                )
            call.hidden = call.hidden.index_select(1, kept)
        text = call.hidden.shape[1] - len(kept)  # 0 where the text's tokens come apart
        if text:
            self._find_order(call.hidden, text)
        self.cut_arguments(call)
        output = call.compute()
        hidden, other = call.parts(output)
        image = hidden if not text else hidden[:, text:] if self._text_first else hidden[:, :-text]
        self._last = image
        if call.index < call.count - 1:
            return output
        image = image.index_select(1, self.nearest.to(image.device))
        if text:
            apart = hidden[:, :text] if self._text_first else hidden[:, -text:]
            image = torch.cat([apart, image] if self._text_first else [image, apart], dim=1)
        return call.output(image, other)

    def cut_arguments(self, call: BlockCall) -> None:
        """Leave the other tokens out of all that a block is given beside the tokens themselves."""
        for name, value, put in _arguments(call):
            put(self._cut(name, value))

    def _find_order(self, hidden: Tensor, text: int) -> None:
        """See whether the text's tokens stand before the sample's, in blocks that get both."""
        last = self._last
        if last is not None and torch.equal(hidden[:, text:], last):
            self._text_first = True
        elif last is not None and torch.equal(hidden[:, :-text], last):
            self._text_first = False
        elif last is not None and last.shape[1] != hidden.shape[1] - text:
            raise SubjectError(
                f"{self.who}: the network's blocks mix the sample's tokens with others."
            )

    def _cut(self, name: str, value: Any) -> Any:
        """What belongs to the kept tokens of an argument that has an entry for each token."""
        if isinstance(value, (tuple, list)):
            first = (
                [value[0]] if value and _is_complex(value[0]) else value
            )  # the text's come apart
            cut = [self._cut(name, entry) for entry in first]
            return type(value)([*cut, *value[len(cut) :]])
        if not isinstance(value, Tensor):
            return value
        total = len(self.nearest)
        if name.startswith(_OF_TIME):
            # With three axes it may be the six values of a modulation that lie there.
            own = value.ndim == 4 or (value.ndim == 3 and total != MODULATION)
            own = own and value.shape[1] == total
            return value.index_select(1, self.kept.to(value.device)) if own else value
        if name.startswith(_OF_TEXT) or not any(mark in name for mark in _OF_TOKENS):
            return value
        if "mask" in name:
            return self._cut_mask(value)
        for axis in _axes(value):
            if value.shape[axis] == total:
                return value.index_select(axis, self.kept.to(value.device))
            if value.shape[axis] > total:  # the text's come first wherever both are in one
                return value.index_select(axis, self._with_text(value.shape[axis], True, value))
        return value

    def _cut_mask(self, mask: Tensor) -> Tensor:
        total = len(self.nearest)
        for axis in range(1, mask.ndim):
            length = mask.shape[axis]
            if length < total:
                continue
            # The sample's tokens are never masked, so they stand where nothing is.
            open_before = _is_open(mask.narrow(axis, 0, total))
            open_behind = _is_open(mask.narrow(axis, length - total, total))
            if not open_before and not open_behind:
                raise SubjectError(
                    f"{self.who}: the network masks tokens of text and sample together, and which is which cannot be told."
                )
            mask = mask.index_select(axis, self._with_text(length, open_behind, mask))
        return mask

    def _with_text(self, length: int, first: bool, like: Tensor) -> Tensor:
        """Places of the text's tokens and the kept ones in a sequence of so many."""
        text = torch.arange(length - len(self.nearest))
        kept = self.kept.cpu()
        order = [text, kept + len(text)] if first else [kept, text + len(self.nearest)]
        return torch.cat(order).to(like.device)


def _is_complex(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_complex()


def _is_open(mask: Tensor) -> bool:
    """Whether a mask, of either kind, lets all of these through."""
    return bool((mask if mask.dtype == torch.bool else mask >= 0).all())


def _axes(value: Tensor) -> tuple[int, ...]:
    """Where an argument may have its tokens, the likeliest first."""
    return {1: (0,), 2: (0,), 3: (1, 0), 4: (2, 1)}.get(value.ndim, ())


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _arguments(call: BlockCall) -> Iterator[tuple[str, Any, Any]]:
    """Name, value and setter of each argument of a block."""
    kind: Any = type(call.module)
    names = _names(kind)
    for place, value in enumerate(call.args):

        def put(new: Any, place: int = place) -> None:
            call.args = (*call.args[:place], new, *call.args[place + 1 :])

        yield (names[place] if place < len(names) else ""), value, put
    for name, value in list(call.kwargs.items()):

        def put_named(new: Any, name: str = name) -> None:
            call.kwargs[name] = new

        yield name, value, put_named


def check_tokens(technique: str, pipe: Any) -> None:
    """Raise a SubjectError where a network's blocks cannot run on some of its tokens."""
    for module in networks(pipe):
        found = blocks(module)
        if not found:
            raise SubjectError(
                f"{technique} leaves tokens out of transformer blocks, and {type(module).__name__} has none; it "
                "works on diffusion transformers."
            )
        for block in found:
            kind: Any = type(block)
            if {"height", "width"} <= set(_names(kind)):
                raise SubjectError(
                    f"{technique} leaves tokens out, and {kind.__name__} needs all of them: it convolves "
                    "over their grid."
                )
