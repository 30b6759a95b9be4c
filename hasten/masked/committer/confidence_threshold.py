"""A confidence threshold: every place that the model is sure of is fixed at once. A plain rival.

Wu et al., "Fast-dLLM" (arXiv 2505.22618), the parallel decoding alone, without its caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hasten.masked.committer.parallel import above, count_parallel
from hasten.masked.run import Run
from hasten.masked.slots import Committer, Guess
from hasten.technique import Card, Contract, Loss, Slot, knob, technique


@technique("confidence_threshold")
@dataclass(frozen=True, kw_only=True)
class ConfidenceThreshold(Committer):
    """Fixes all places whose best token is likely enough, and always the best one."""

    card: ClassVar[Card] = Card(
        title="Parallel decoding above a confidence threshold (Fast-dLLM)",
        family="dlm",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2505.22618",
        year=2025,
        neutral={"threshold": 2.0},
        saves="passes",
        notes="Places that are fixed together are each taken for sure alone, not as a whole.",
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.COMMITTER,), runners=frozenset({"eager", "compiled"})
    )

    threshold: float = knob(
        0.9,
        "confidence from which a place is fixed; lower fixes more at once and is wrong more often; "
        "above 1 each pass fixes one",
        low=0.0,
        high=2.0,
    )

    def choose(self, state: Any, run: Run, guess: Guess) -> Tensor:
        """The open places at or above the threshold, and the best of each row."""
        chosen = above(run, guess, self.threshold)
        count_parallel(run, chosen, self.name)
        return chosen
