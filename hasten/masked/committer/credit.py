"""Credit: a token that stays a place's favourite pass after pass is believed sooner.

From the reference code of dInfer: a matrix over the places of a block and the vocabulary fades from
pass to pass, grows at the favourite of each open place, and lifts the logits by its logarithm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Credit:
    """What the passes over one block have favoured so far.

    Attributes:
        weight: how much credit lifts the logits; 0 leaves them as they are.
        decay: part of the credit that is left at the next pass.
        power: of the favourite's probability; the lower, the more a doubtful favourite gets.
        matrix: (batch, wanted, vocabulary) float32 credit; None before a block's first pass.
        key: what the matrix belongs to; another key starts anew.
    """

    weight: float
    decay: float
    power: float
    matrix: Tensor | None = None
    key: Any = None

    def fuse(self, logits: Tensor, masked: Tensor, key: Any) -> Tensor:
        """Logits (batch, wanted, vocabulary) with the credit of this and all earlier passes.

        Args:
            masked: (batch, wanted) bool, places that gain credit now.
            key: the block in hand.
        """
        if self.matrix is None or key != self.key:
            self.matrix, self.key = torch.zeros_like(logits), key
        else:
            self.matrix *= self.decay
        best, token = logits.softmax(dim=-1).max(dim=-1, keepdim=True)
        gained = best.pow(self.power).masked_fill(~masked[..., None], 0.0)
        self.matrix.scatter_add_(2, token, gained)
        return logits + self.weight * self.matrix.log1p()
