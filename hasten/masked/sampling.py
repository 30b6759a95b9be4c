"""Which token a place gets: the likeliest, or one drawn with noise that belongs to the place."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from hasten.causal.generation import Settings


def chance(logits: Tensor, tokens: Tensor) -> Tensor:
    """(..., wanted) the probability of tokens (..., wanted) for logits (..., wanted, vocabulary)."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return (chosen - logits.logsumexp(dim=-1)).exp()


class Sampler:
    """Greedy choice, or sampling by adding noise to the logits (Gumbel-max).

    The noise of a place is drawn once for a call, from the seed, the row and the place. So the draw
    depends on the text alone and not on how many passes came before, and whoever gets to the same
    text faster draws the same tokens.
    """

    def __init__(self, settings: Settings, batch: int) -> None:
        self.greedy = not settings.do_sample or settings.temperature == 0
        self.temperature = settings.temperature
        self.penalty = settings.repetition_penalty
        warpers = LogitsProcessorList()
        if not self.greedy and settings.top_k:
            warpers.append(TopKLogitsWarper(int(settings.top_k)))
        if not self.greedy and settings.top_p < 1.0:
            warpers.append(TopPLogitsWarper(float(settings.top_p)))
        self.warpers = warpers
        seed = settings.seed
        self.seed = int(torch.randint(2**31, ())) if seed is None else seed
        self.batch = batch
        self._places = (0, 0)  # the first and the end of those that noise is kept of
        self._noise: dict[int, Tensor] = {}  # by row

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether a token depends on the logits of its place alone."""
        return self.greedy and self.penalty == 1.0

    def best(
        self,
        logits: Tensor,
        tokens: Tensor,
        wanted: Tensor,
        mask_id: int,
        entries: Tensor | None = None,
    ) -> Tensor:
        """(batch, wanted) ids for logits (batch, wanted, vocabulary).

        Args:
            tokens: (batch, length) the text; a penalty counts what is fixed in it.
            entries: (batch,) row of the call that each entry belongs to; None for one each.
        """
        if self.penalty != 1.0:
            logits = self._penalized(logits, tokens, mask_id)
        if self.greedy:
            return logits.argmax(dim=-1)
        scores = logits / self.temperature
        if len(self.warpers):
            flat = scores.flatten(0, 1)
            nothing = torch.empty((0, 0), dtype=torch.long)  # these warpers look at scores only
            scores = self.warpers(nothing, flat).view_as(scores)  # type: ignore[arg-type]
        rows = torch.arange(logits.shape[0]) if entries is None else entries
        return (scores + self._gumbel(rows, wanted, logits)).argmax(dim=-1)

    def _penalized(self, logits: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
        """Logits of ids that the text holds already, divided or multiplied as transformers does."""
        seen = torch.zeros(
            (logits.shape[0], logits.shape[2]), dtype=torch.bool, device=logits.device
        ).scatter_(1, tokens, True)
        seen[:, mask_id] = False
        lowered = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return torch.where(seen[:, None], lowered, logits)

    def _gumbel(self, rows: Tensor, wanted: Tensor, like: Tensor) -> Tensor:
        """Noise (batch, wanted, vocabulary) of the places."""
        places = (int(wanted[0]), int(wanted[-1]) + 1)
        if places != self._places:
            self._places, self._noise = places, {}
        count = int(rows.max()) + 1
        for row in range(len(self._noise), count):
            self._noise[row] = torch.stack(
                [self._draw(row, place, like.shape[2]) for place in range(*places)]
            ).to(like.device)
        noise = torch.stack([self._noise[row] for row in range(count)])
        return noise[rows.to(like.device)]

    def _draw(self, row: int, place: int, size: int) -> Tensor:
        """Standard Gumbel noise of one place, (size,); always drawn on the CPU."""
        generator = torch.Generator().manual_seed(
            ((self.seed * 1_000_003 + row) * 65_537 + place) % 2**63
        )
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return -(-uniform.clamp_min(1e-300).log()).clamp_min(1e-300).log().float()
