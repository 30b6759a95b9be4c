"""Smoothing: what a pass believed of the open places is read by the next one.

From the reference code of dInfer: an open place is read as the mask's embedding plus a share of the
mean embedding of its predicted tokens. Ours: the share goes to the places that logits were asked
for, those of the block in hand, while the reference code softens the masks of later blocks too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hasten.masked.run import Run


@dataclass
class Smoothing:
    """Beliefs of the pass before.

    Attributes:
        first: share of the beliefs after the first pass of the call.
        growth: what the share gains with each pass.
        most: the highest share.
        passes: passes that have spoken so far.
        logits: (batch, wanted, vocabulary) of the last one.
        wanted: (wanted,) the places that they are about.
    """

    first: float
    growth: float
    most: float
    passes: int = 0
    logits: Tensor | None = None
    wanted: Tensor | None = None

    @property
    def share(self) -> float:
        """Weight of the beliefs of the last pass."""
        return min(self.first + self.growth * (self.passes - 1), self.most)

    def heed(self, logits: Tensor, wanted: Tensor) -> None:
        """Remember what a pass says."""
        self.logits, self.wanted = logits, wanted
        self.passes += 1

    @torch.no_grad()
    def embed(self, run: Run, tokens: Tensor, rows: Tensor | None) -> tuple[Tensor | None, int]:
        """Embeddings (batch, rows, hidden) of tokens (batch, rows), and how many were softened.

        None where the last pass said nothing of any place that is still open.
        """
        if self.logits is None or self.wanted is None:
            return None, 0
        entry, place = run.masked[:, self.wanted].nonzero(as_tuple=True)
        column = self.wanted[place]
        if rows is not None:
            at = torch.searchsorted(rows, column).clamp(max=rows.numel() - 1)
            computed = rows[at] == column
            entry, place, column = entry[computed], place[computed], at[computed]
        if entry.numel() == 0:
            return None, 0
        layer = run.denoiser.runner.model.get_input_embeddings()
        assert isinstance(layer, nn.Embedding)
        chances = self.logits[entry, place].softmax(dim=-1)
        table = _table(layer, chances.shape[1])
        read = layer(tokens)
        read[entry, column] += self.share * (chances.to(table.dtype) @ table)
        return read, entry.numel()


def _table(layer: nn.Embedding, size: int) -> Tensor:
    """Embeddings (size, hidden) of the first ids, scaled as the model reads them."""
    if type(layer) is nn.Embedding:
        return layer.weight[:size]
    return layer(torch.arange(size, device=layer.weight.device))
