"""The slots of the training engine, as far as there are techniques for them.

    loss        adds a term to the objective

A term gets `state`, what its own `begin` returned for this run, because technique objects hold
knobs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hasten.technique import Technique

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Step:
    """One forward pass of training, as a loss term sees it.

    Attributes:
        ids: (rows, length) the text.
        inputs: (rows, length) what the model read: the text with masks.
        wanted: (rows, length) bool, the tokens that the model has to predict; never the first.
        hidden: the model's states (rows, length, hidden), of the embeddings and of each layer.
            The state at position i predicts token i + 1.
    """

    ids: Tensor
    inputs: Tensor
    wanted: Tensor
    hidden: tuple[Tensor, ...]


class LossTerm(Technique):
    """Adds a term to what training lowers."""

    def begin(self, model: PreTrainedModel) -> Any:
        """Make this run's state from the model as it is before the first step."""
        return None

    def term(self, state: Any, step: Step) -> Tensor:
        """The weighted term, a scalar."""
        raise NotImplementedError
