"""What every acceptor shares: the verdict of a pass without a draft, and the count of what it won."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.causal.run import Run
from hasten.causal.runners import Output
from hasten.causal.slots import Draft, Verdict


def plain(run: Run, output: Output) -> Verdict:
    """One token a row, taken as the model alone would take it."""
    return Verdict(run.sampler.pick(run.scores(output.logits[:, -1]))[:, None])


@dataclass
class Tally:
    """Counts drafted nodes and the tokens that drafts brought beyond one per pass and row.

    A row's gain is read off its length one pass later, so tokens that a stop cut off do not count.
    """

    drafted: int = 0
    accepted: int = 0
    _before: Tensor | None = None

    def drafting(self, run: Run, draft: Draft | None) -> Draft | None:
        """Note a draft that is about to be verified (or that there is none), and pass it on."""
        self.settle(run)
        if draft is not None:
            self._before = run.lengths
            if run.batch == 1:
                self.drafted += draft.num_nodes
            else:
                self.drafted += int(((draft.tokens >= 0) & ~run.finished[:, None]).sum())
        return draft

    def settle(self, run: Run) -> None:
        """Count what the last draft brought."""
        if self._before is not None:
            gained = run.lengths - self._before - 1
            self.accepted += int(gained.clamp(min=0).sum())
            self._before = None

    def publish(self, run: Run, name: str) -> None:
        """Write the counters at the call's end, if there is anything to tell."""
        self.settle(run)
        if self.accepted:
            run.activity[f"{name}.drafted"] += self.drafted
            run.activity[f"{name}.accepted"] += self.accepted
