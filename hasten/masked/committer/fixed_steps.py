"""A fixed number of tokens a pass: the plain way to spend fewer passes than tokens.

The sampler of LLaDA (arXiv 2502.09992) at a given number of steps: of each block it fixes the same
number of places in every pass, the most confident ones. What is inferred: where the number does not
divide the block, LLaDA gives its first passes one place more; here the last pass fixes what is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hasten.masked.committer.parallel import count_parallel
from hasten.masked.run import Run
from hasten.masked.slots import Committer, Guess
from hasten.technique import Card, Contract, Loss, Slot, knob, technique


@technique("fixed_steps")
@dataclass(frozen=True, kw_only=True)
class FixedSteps(Committer):
    """Fixes as many places in each pass, however sure the model is of them."""

    card: ClassVar[Card] = Card(
        title="A fixed number of tokens a pass",
        family="dlm",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2502.09992",
        year=2025,
        neutral={"tokens_per_pass": 1},
        saves="passes",
        notes=(
            "The lower bound for committers: its number of passes is known beforehand, and it breaks "
            "first where places that are filled together depend on each other."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.COMMITTER,), runners=frozenset({"eager", "compiled"})
    )

    tokens_per_pass: int = knob(
        2, "places that each pass fixes in a row of the batch; more is faster and worse", low=1
    )

    def choose(self, state: Any, run: Run, guess: Guess) -> Tensor:
        """The most confident open places of each row."""
        chosen = run.best(guess, run.open, self.tokens_per_pass)
        count_parallel(run, chosen, self.name)
        return chosen
