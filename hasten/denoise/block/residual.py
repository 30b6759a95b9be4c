"""What blocks add to their input, kept from one step for later ones."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hasten.denoise.blocks import BlockCall, blocks
from hasten.denoise.network import networks
from hasten.denoise.run import Run
from hasten.errors import SubjectError

Tokens = tuple[Tensor, Tensor | None]
"""(rows, tokens, hidden) of the sample and, where a block changes the text too, of the text."""


@dataclass(frozen=True)
class Kept:
    """What stands for blocks that do not run.

    Attributes:
        hidden, text: (rows, tokens, hidden); `text` is None where the blocks leave the text alone.
        rows: which rows of the pipeline's call they are of.
        whole: they are the blocks' output itself, not what it adds to the input.
    """

    hidden: Tensor
    text: Tensor | None
    rows: tuple[int, ...]
    whole: bool = False

    @classmethod
    def between(cls, run: Run, before: Tokens, after: Tokens, *, whole: bool = False) -> Kept:
        """What blocks between two places of the network added, or their output."""
        if whole:
            return cls(*after, run.rows, whole=True)
        text = None if before[1] is None or after[1] is None else after[1] - before[1]
        return cls(after[0] - before[0], text, run.rows)

    def onto(self, call: BlockCall) -> Any:
        """The output of the blocks as it would be by this, for the input in hand."""
        hidden, text = self.hidden, self.text
        if not self.whole:
            hidden = call.hidden + hidden
            text = text if text is None or call.text is None else call.text + text
        return call.output(hidden, call.text if text is None else text)

    def fitted(self, run: Run, call: BlockCall) -> Kept | None:
        """The same for the rows that the call holds; None where it does not fit them."""
        hidden = run.fit(self.hidden, self.rows)
        text = None if self.text is None else run.fit(self.text, self.rows)
        if hidden is None or hidden.shape != call.hidden.shape:
            return None
        if text is not None and (call.text is None or text.shape != call.text.shape):
            return None
        return Kept(hidden, text, run.rows, self.whole)


def tokens_of(call: BlockCall) -> Tokens:
    """What a block is given."""
    return call.hidden, call.text


def through(call: BlockCall) -> Any:
    """What a block puts out if it adds nothing to its input.

    A residual layer of a U-Net may make other channels of it; then its shortcut still runs.
    """
    hidden, text = tokens_of(call)
    shortcut = getattr(call.module, "conv_shortcut", None)
    return call.output(hidden if shortcut is None else shortcut(hidden), text)


def check_blocks(pipe: Any, name: str) -> None:
    """Raise a SubjectError where the pipeline's network has no list of transformer blocks."""
    network = networks(pipe)[0]
    if not blocks(network):
        raise SubjectError(
            f"{name} works on transformer blocks, and {type(network).__name__} has no list of them (a U-Net "
            "has none); use a technique of the gate slot, such as zeus."
        )


def reads_back(network: nn.Module) -> bool:
    """Whether later blocks read what earlier ones put out, as in networks with long skips."""
    return any("skip" in inspect.signature(type(b).forward).parameters for b in blocks(network))
