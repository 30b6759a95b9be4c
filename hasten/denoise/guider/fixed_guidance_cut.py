"""Guidance in a fixed part of the way only: the plain rule that Adaptive Guidance must beat.

With `first=0` it is the rule of "Step AG" (arXiv 2506.08351); with `last=1` it guides the end only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.network import Call
from hasten.denoise.run import Run, Step
from hasten.denoise.slots import Guider
from hasten.technique import Card, Contract, Loss, Resource, Slot, knob, technique


@dataclass
class State:
    """How many samples a call has, once that is known."""

    samples: int = 0


@technique("fixed_guidance_cut")
@dataclass(frozen=True, kw_only=True)
class FixedGuidanceCut(Guider):
    """Guides in a fixed part of the steps, the same for all samples."""

    card: ClassVar[Card] = Card(
        title="Guidance in a fixed part of the steps",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2506.08351",
        year=2025,
        neutral={"first": 0.0, "last": 1.0},
        saves="guidance",
        notes=(
            "The very first step always runs both branches, because that is how they are told apart."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.GUIDER,),
        needs=frozenset({Resource.TRAJECTORY}),
        runners=frozenset({"eager", "compiled"}),
    )

    first: float = knob(0.0, "share of the steps after which guidance begins", low=0.0, high=1.0)
    last: float = knob(0.65, "share of the steps after which guidance ends", low=0.0, high=1.0)

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        return State()

    def wanted(self, state: State, run: Run, call: Call) -> Tensor:
        """All samples or none."""
        guided = run.index in run.span(self.first, self.last, of=1)
        if not guided:
            run.activity[f"{self.name}.unguided_steps"] += 1
        return torch.full((state.samples,), guided)

    def compare(
        self, state: State, run: Run, conditional: Tensor, unconditional: Tensor, step: Step
    ) -> None:
        """Note how many samples there are."""
        state.samples = len(conditional)
