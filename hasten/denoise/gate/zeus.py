"""ZEUS: two of three network calls give way to a straight line through the last two outputs.

Project page and code of Jiang et al. (2025 to 2026), "ZEUS: Accelerating Diffusion Models with Only
Second-Order Predictor", after the released code. The output after guidance is predicted, as there:
odd skips of a run use `2 * newest - before` of the last two outputs that the network computed, even
ones the newest itself, so that nothing is predicted from a prediction. As in the code the difference
is not divided by the steps that lie between the two outputs (`by_gap` does). From `late` on one call
of `late_interval` runs, and solvers that go by the clean sample get it from a polynomial through
clean samples of steps before; flow models keep the straight line. Up to
six steps are skipped in a row, as in its demos and published counts (its own default is four). Ours:
the ranges are shares of the steps, where the code has numbers for 50; and a scheduler whose noise levels are not known keeps
the straight line too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hasten.denoise.gate.history import Nodes
from hasten.denoise.gate.late import LateGate, Skips
from hasten.denoise.levels import is_flow
from hasten.denoise.run import Run, Step
from hasten.errors import SubjectError
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)


@dataclass(kw_only=True)
class State(Skips):
    """One call.

    Attributes:
        fresh: (step, output after guidance) of the last steps that ran, newest first.
        ahead: the straight line's value one step on; made once for a run of skips.
    """

    fresh: list[tuple[int, Tensor]] = field(default_factory=list)
    ahead: Tensor | None = None


@technique("zeus")
@dataclass(frozen=True, kw_only=True)
class Zeus(LateGate):
    """Second-order prediction of outputs, by turns with their reuse."""

    card: ClassVar[Card] = Card(
        title="ZEUS: skipping steps with only a second-order predictor",
        paper="zeus",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://github.com/Ting-Justin-Jiang/ZEUS",
        year=2026,
        claims=(
            Claim("speed-up", 2.46, "FLUX.1-dev, 50 steps, batch 1"),
            Claim("speed-up", 2.30, "SDXL, DPM-Solver++, 50 steps, 24 calls"),
            Claim("speed-up", 3.2, "best of all image and video models"),
            Claim("ImageReward lost", 0.021, "SDXL, 0.755 to 0.734"),
        ),
        neutral={"skip": 0},
        rival=Rival(
            "zeus(skip={skip}, period={period}, predictor=extrapolate)",
            "psnr",
            "the straight line followed further and further within a run of skips",
        ),
        saves="calls",
        notes=(
            "Fails past about eight skips in a row. Samplers of eight steps or fewer are left as "
            "they are. Its history begins anew where the sample changes its size. On the zoo's model of "
            "noise, plain reuse comes nearer to the full run than its turns with the straight line: "
            "the difference of outputs that lie three steps apart goes too far for one (by_gap)."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.GATE,),
        reads=frozenset({Resource.TRAJECTORY}),
        changes=frozenset({Resource.EVERY_CALL}),
        needs=frozenset({Resource.TRAJECTORY}),
        runners=frozenset({"eager", "compiled"}),
    )

    skip: int = knob(
        2, "calls of each period that are dropped; more save more and drift more", low=0, high=11
    )
    period: int = knob(3, "steps of a period", low=1, high=12)
    start: float = knob(0.2, "share of the steps before which all run", low=0.0, high=1.0)
    end: float = knob(0.9, "share of the steps after which all run", low=0.0, high=1.0)
    late: float = knob(
        0.48, "share of the steps from which one of late_interval runs", low=0.0, high=1.0
    )
    late_interval: int = knob(6, "steps to each call that runs, late", low=2, high=12)
    max_skips: int = knob(6, "steps in a row that may be skipped", low=1, high=12)
    terms_late: int = knob(4, "clean samples that the late polynomial goes through", low=2, high=6)
    predictor: str = knob(
        "interleave",
        "what stands for dropped outputs: the straight line and reuse by turns; reuse; the straight "
        "line; a parabola. All but the first are ablations",
        choices=("interleave", "reuse", "extrapolate", "quadratic"),
    )
    by_gap: bool = knob(
        False, "divide the last difference by the steps between its outputs; an ablation"
    )

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        return State(nodes=Nodes(self.terms_late))

    def window(self, run: Run) -> range:
        """See `LateGate.window`."""
        return super().window(run) if self.skip else range(0)

    def correct(self, state: State, run: Run, step: Step) -> Tensor:
        """The output that the solver is given: what was computed, or what stands for it."""
        output = self.interpolated(state, run, step)
        if step.ran:
            state.ahead, state.skips = None, 0
            keep = 3 if self.predictor == "quadratic" else 2
            state.fresh = [(step.index, step.output), *state.fresh][:keep]
            output = step.output
        elif output is None:
            output = self._predicted(state, run)
        if self._interpolates(run, step):
            self.add_node(state, run, step, output)
        return output

    def stepped(self, state: State, run: Run, step: Step) -> None:
        """Decide whether the next call is dropped."""
        wanted = self.late_rule(state, run, step)
        if wanted is None:
            wanted = step.index % self.period < self.skip
        allowed = step.index in self.window(run) and len(state.fresh) > 1
        state.follow(wanted and allowed, self.max_skips)

    def _interpolates(self, run: Run, step: Step) -> bool:
        """Whether late steps go by the clean sample."""
        if is_flow(run.scheduler) or not self.window(run):
            return False
        try:
            run.level(step)
        except SubjectError:
            return False
        return True

    def _predicted(self, state: State, run: Run) -> Tensor:
        """What stands for the output of a skipped step, from those that were computed."""
        (place, newest), (place_before, before) = state.fresh[:2]
        skip = state.skips
        turn = self.predictor == "interleave" and skip % 2 == 0
        if turn or self.predictor == "reuse":
            run.activity["zeus.reused"] += 1
            return newest
        run.activity["zeus.predicted"] += 1
        gap = place - place_before if self.by_gap else 1
        if self.predictor == "interleave":
            if state.ahead is None:
                state.ahead = _line(newest, before, 1 / gap)
            return state.ahead
        line = _line(newest, before, skip / gap)
        if self.predictor == "extrapolate" or len(state.fresh) < 3:
            return line
        bend = newest - 2 * before + state.fresh[2][1]
        return line + skip * (skip + 1) / 2 * bend


def _line(newest: Tensor, before: Tensor, steps: float) -> Tensor:
    """The straight line through two values, so many of their distances on."""
    return (1 + steps) * newest - steps * before
