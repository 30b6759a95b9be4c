"""What a runner takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from hasten.masked.buffers import Buffers


@dataclass
class Look:
    """The input of one pass.

    Attributes:
        tokens: (batch, rows) ids.
        positions: (batch, rows) their positions.
        kept: (kept,) the rows whose logits are wanted, ascending.
        visible: bool (batch or 1, 1, rows, columns), True where a row may look; the columns are the
            rows, or what `cache.read` gives. None hides nothing.
        cache: where keys and values are kept; None keeps nothing.
        embeddings: (batch, rows, hidden) to be read instead of the tokens' own.
    """

    tokens: Tensor
    positions: Tensor
    kept: Tensor
    visible: Tensor | None = None
    cache: Buffers | None = None
    embeddings: Tensor | None = None


class Runner:
    """Runs passes of one model."""

    name: ClassVar[str]

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self) -> None:
        """Told before each call; a place to find out whether the model has changed."""

    def logits(self, look: Look) -> Tensor:
        """(batch, kept, vocabulary), in the model's dtype."""
        raise NotImplementedError
