"""Gates that decide at each step whether the next one runs, and have a rule of their own for late steps.

Late in sampling the clean sample changes so smoothly that one of so many steps is enough: at the
others it is taken from a polynomial through the clean samples of a few steps before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hasten.denoise.gate.history import Nodes, clean_sample, late_step, output_for, window
from hasten.denoise.network import Call
from hasten.denoise.run import Run, Step
from hasten.denoise.slots import Gate


@dataclass(kw_only=True)
class Skips:
    """What such a gate remembers of one call.

    Attributes:
        nodes: clean samples of single steps, for the polynomial.
        skips: how many steps were skipped in a row, the next one counted if it will be.
        drop, late: whether the next step is skipped, and whether by the late rule.
    """

    nodes: Nodes
    skips: int = 0
    drop: bool = False
    late: bool = False

    def follow(self, wanted: bool, most: int) -> None:
        """Skip the next step if that is wanted, and not after `most` others."""
        self.drop = wanted and self.skips < most
        self.skips = self.skips + 1 if self.drop else 0


class LateGate(Gate):
    """The knobs and steps that such gates share."""

    start: float
    end: float
    late: float
    late_interval: int

    def decide(self, state: Any, run: Run, call: Call) -> bool:
        """See `Gate.decide`; the step before has decided."""
        return not state.drop

    def window(self, run: Run) -> range:
        """The steps after which the next one may be skipped."""
        return window(run, self.start, self.end)

    def late_rule(self, state: Skips, run: Run, step: Step) -> bool | None:
        """Whether the late rule skips the next step; None before it holds."""
        state.late = step.index >= late_step(run, self.late, self.late_interval)
        return step.index % self.late_interval != 0 if state.late else None

    def interpolated(self, state: Skips, run: Run, step: Step) -> Tensor | None:
        """What stands for the output of a step that the late rule skipped; None for other steps."""
        if step.ran or not state.late or len(state.nodes) < 2:
            return None
        run.activity[f"{self.name}.interpolated"] += 1
        clean = state.nodes.at(step.index)
        return output_for(run.level(step), clean, step.output, step.sample)

    def add_node(self, state: Skips, run: Run, step: Step, output: Tensor) -> None:
        """Keep the clean sample that the solver's output speaks of, at one of `late_interval` steps."""
        if step.index % self.late_interval == 1:
            state.nodes.add(step.index, clean_sample(run.level(step), output, step.sample))
