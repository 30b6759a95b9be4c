"""What every acceptor shares: the verdict of a pass without a draft, and the count of what it won."""

from __future__ import annotations

from dataclasses import dataclass

from hasten.causal.run import Run
from hasten.causal.runners import Output
from hasten.causal.slots import Draft, Verdict


def plain(run: Run, output: Output) -> Verdict:
    """One token a row, taken as the model alone would take it."""
    return Verdict(run.sampler.pick(run.scores(output.logits[:, -1]))[:, None])


@dataclass
class Tally:
    """Counts drafted nodes and the tokens that drafts brought beyond one per pass and row.

    Tokens that a stop cut off do not count as accepted (`Run.gained`).
    """

    drafted: int = 0
    accepted: int = 0

    def drafting(self, run: Run, draft: Draft | None) -> Draft | None:
        """Note a draft that is about to be verified (or that there is none), and pass it on."""
        if draft is not None:
            if run.batch == 1:
                self.drafted += draft.num_nodes
            else:
                self.drafted += int(((draft.tokens >= 0) & ~run.finished[:, None]).sum())
        return draft

    def publish(self, run: Run, name: str) -> None:
        """Write the counters at the call's end; nothing where nothing happened."""
        self.accepted = run.gained
        for what, count in (("drafted", self.drafted), ("accepted", self.accepted)):
            if count:
                run.activity[f"{name}.{what}"] += count
