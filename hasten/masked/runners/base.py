"""What a runner takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hasten.masked.buffers import Buffers


@dataclass
class Look:
    """The input of one pass.

    Attributes:
        tokens: (batch, rows) ids.
        positions: (batch, rows) their positions.
        kept: (kept,) the rows of which something is wanted, ascending.
        mask_id: the token that is never said.
        visible: bool (batch or 1, 1, rows, columns), True where a row may look; the columns are the
            rows, or what `cache.read` gives. None hides nothing.
        cache: where keys and values are kept; None keeps nothing.
        embeddings: (batch, rows, hidden) to be read instead of the tokens' own.
    """

    tokens: Tensor
    positions: Tensor
    kept: Tensor
    mask_id: int
    visible: Tensor | None = None
    cache: Buffers | None = None
    embeddings: Tensor | None = None


@dataclass
class Said:
    """What a pass says of rows.

    Attributes:
        logits: (batch, rows, vocabulary) float32, -inf for the mask.
        best: (batch, rows) the likeliest token, of equal ones the first.
        chance: (batch, rows) its probability.
    """

    logits: Tensor
    best: Tensor
    chance: Tensor

    @classmethod
    def of(cls, logits: Tensor, mask_id: int) -> Self:
        """Logits (batch, rows, vocabulary) as a model gives them, read."""
        logits = logits.float()
        logits[..., mask_id] = -torch.inf
        peak = logits.amax(dim=-1, keepdim=True)
        return cls(logits, logits.argmax(dim=-1), 1 / (logits - peak).exp().sum(dim=-1))

    def __getitem__(self, where: Any) -> Said:
        """What it says of some of the rows; `where` indexes the batch and the rows."""
        return Said(self.logits[where], self.best[where], self.chance[where])


class Runner:
    """Runs passes of one model."""

    name: ClassVar[str]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self) -> None:
        """Told before each call; a place to find out whether the model has changed."""

    def read(self, look: Look) -> Said:
        """What the model says of the rows that are kept."""
        raise NotImplementedError
