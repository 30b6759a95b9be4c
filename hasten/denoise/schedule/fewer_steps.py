"""The same sampler with fewer steps, spread as it spreads them itself. A plain rival.

The pipeline is asked for fewer steps, so the pictures are bit for bit those of the plain pipeline
at that number, with its own spacing, shift and start. Timesteps or noise levels that are given to
the call are thinned out evenly.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, ClassVar

from hasten.denoise.run import Run
from hasten.denoise.slots import Schedule
from hasten.errors import SubjectError
from hasten.technique import Card, Contract, Loss, Resource, Slot, knob, technique

COUNT = "num_inference_steps"


@technique("fewer_steps")
@dataclass(frozen=True, kw_only=True)
class FewerSteps(Schedule):
    """Walks a share of the steps."""

    card: ClassVar[Card] = Card(
        title="Fewer uniform steps",
        family="diffusion",
        loss=Loss.LOSSY,
        neutral={"share": 1.0},
        saves="calls",
        notes="What any technique that saves calls has to beat at the same number of calls.",
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.SCHEDULE,),
        changes=frozenset({Resource.TIMESTEPS}),
        runners=frozenset({"eager", "compiled"}),
    )

    share: float = knob(0.5, "share of the steps that are walked", low=0.0, high=1.0)
    steps: int | None = knob(None, "number of steps that are walked, instead of a share", low=1)

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        if COUNT not in inspect.signature(pipe.__call__).parameters:
            raise SubjectError(
                f"{type(pipe).__name__} takes no {COUNT}, so fewer_steps has nothing to lower."
            )

    def ask(self, state: Any, run: Run, arguments: dict[str, Any]) -> None:
        """Ask the pipeline for fewer steps than it was asked for."""
        for name in ("timesteps", "sigmas"):
            if arguments.get(name) is not None:
                given = list(arguments[name])
                count = self._count(len(given))
                arguments[name] = [given[len(given) * i // count] for i in range(count)]
                self._note(run, len(given) - count)
                return
        asked = arguments.get(COUNT)
        if asked is None:
            asked = inspect.signature(run.pipe.__call__).parameters[COUNT].default
        count = self._count(int(asked))
        arguments[COUNT] = count
        self._note(run, int(asked) - count)

    def _count(self, asked: int) -> int:
        wanted = round(self.share * asked) if self.steps is None else self.steps
        return min(max(wanted, 1), asked)

    def _note(self, run: Run, saved: int) -> None:
        if saved:
            run.activity["fewer_steps.left_out"] += saved
