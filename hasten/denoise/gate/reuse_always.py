"""Every n-th call runs, and its output is used again until the next one does. A plain rival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hasten.denoise.network import Call
from hasten.denoise.run import Run
from hasten.denoise.slots import Gate
from hasten.technique import Card, Contract, Loss, Resource, Slot, knob, technique


@technique("reuse_always")
@dataclass(frozen=True, kw_only=True)
class ReuseAlways(Gate):
    """Computes one of `interval` steps and reuses its output in the others."""

    card: ClassVar[Card] = Card(
        title="Reuse of the last output at fixed steps",
        family="diffusion",
        loss=Loss.LOSSY,
        neutral={"interval": 1},
        saves="calls",
        notes="The plainest of all gates: nothing is predicted, and nothing decides.",
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.GATE,),
        changes=frozenset({Resource.EVERY_CALL}),
        needs=frozenset({Resource.TRAJECTORY}),
        runners=frozenset({"eager", "compiled"}),
    )

    interval: int = knob(2, "steps to each call that runs; more save more", low=1)

    def decide(self, state: Any, run: Run, call: Call) -> bool:
        """See `Gate.decide`."""
        runs = run.index % self.interval == 0
        if not runs:
            run.activity["reuse_always.reused"] += 1
        return runs
