"""Adaptive Guidance: the unconditional branch runs until it says what the conditional one says.

"Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models" (arXiv 2312.12487),
after the paper; it comes with no code. After each step with both branches their predictions are
compared by the cosine between them, and from the step after the one that reaches a threshold on,
the conditional branch runs alone. The switch is for good, and each sample of a batch has its own.

LinearAG, also of the paper, takes the unconditional prediction at other steps from earlier ones, by
scalar coefficients that `prepare` fits for a number of steps and a guidance scale (`linear`). Inferred:
in the first half of sampling every other step runs both branches; all others take it from the fit,
until the sample has switched.

The paper compares the networks' predictions of noise. While there is much of it, those are nearly
equal whatever the caption, and a network that predicts a flow speaks of no noise but the sample
itself. So the predicted clean samples are compared, as widely used ports do, at a threshold for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.guidance import like
from hasten.denoise.guider.linear import Way, fit_pipeline, predict
from hasten.denoise.levels import check_levels
from hasten.denoise.network import Call
from hasten.denoise.run import Run, Step
from hasten.denoise.slots import Guider
from hasten.errors import HastenError
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Parts,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)

NEVER = 1.0  # a cosine that no pair of predictions passes


@dataclass
class State:
    """One call.

    Attributes:
        switched: (samples,) whose unconditional branch runs no more; None before the first step.
        cosines: (samples,) of each step that compared, in order; NaN where a sample did not.
        parts: the fit of LinearAG; `way`: what both branches said so far, for it.
        fitted: whether the step in hand takes the unconditional prediction from the fit.
    """

    switched: Tensor | None
    cosines: list[Tensor]
    parts: Parts
    way: Way = field(default_factory=Way)
    fitted: bool = False


@technique("adaptive_guidance")
@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance(Guider):
    """Stops guiding each sample once both branches agree."""

    card: ClassVar[Card] = Card(
        title="Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models",
        paper="adaptive_guidance",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2312.12487",
        year=2023,
        claims=(
            Claim(
                "network evaluations saved",
                0.25,
                "EMU-768 and LDM-512, 20 steps of DPM-Solver++, guidance 7.5, preferred as often",
            ),
        ),
        neutral={"threshold": NEVER},
        rival=Rival(
            "fixed_guidance_cut(first=0.35, last=1.0)",
            "psnr",
            "guides the end of the way instead of its beginning",
        ),
        saves="guidance",
        notes=(
            "Saves at most the unconditional branch, half of a guided model's work. Without guidance "
            "there is nothing to leave out, and it is inactive. Pipelines that run the unconditional "
            "branch first, in a call of its own, keep it. The paper compares noise, at 0.99 or "
            "so: in the models of the zoo that stops guiding at once. As many evaluations, spent on "
            "fewer steps that are all guided, come further from the full run with the zoo's model of "
            "velocities, and as near with its model of noise."
        ),
    )
    part_knobs: ClassVar[tuple[str, ...]] = ("linear", "steps")
    part_settings: ClassVar[tuple[str, ...]] = ("guidance", "size", "scheduler")
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.GUIDER,),
        needs=frozenset({Resource.TRAJECTORY}),
        runners=frozenset({"eager", "compiled"}),
    )

    threshold: float = knob(
        0.995,
        "cosine between the branches from which a sample is guided no more; lower saves more and "
        "drifts more; 1 never stops, -1 stops after the first step",
        low=-1.0,
        high=NEVER,
    )
    compare_as: str = knob(
        "clean",
        "what is compared: predicted clean samples, predicted noise, or the network's output",
        choices=("clean", "noise", "output"),
    )
    linear: bool = knob(
        False, "take other unconditional predictions from a fit; saves more, drifts more (LinearAG)"
    )
    steps: int = knob(20, "number of steps that the fit is for", low=2)
    trajectories: int = knob(200, "guided ways that are fitted", low=1)

    @property
    def trained(self) -> bool:
        """Only LinearAG needs a fit."""
        return self.linear

    def terms(self) -> Contract:
        """LinearAG needs the outputs of every step."""
        if not self.linear:
            return self.contract
        return replace(self.contract, needs=self.contract.needs | {Resource.EVERY_CALL})

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        if self.compare_as != "output":
            check_levels(pipe.scheduler, f"{self.name}(compare_as={self.compare_as})")

    def prepare(self, preparation: Any) -> Parts:
        """Fit LinearAG's coefficients: "conditional", "unconditional", (steps, steps); "explained"."""
        if not self.linear:
            return {}
        return fit_pipeline(preparation, self.steps, preparation.steps or self.trajectories)

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        return State(None, [], bound)

    def wanted(self, state: State, run: Run, call: Call) -> Tensor:
        """The samples that have not switched."""
        assert state.switched is not None, "asked before any step was compared"
        state.fitted = self.linear and (run.index % 2 == 1 or run.index >= run.num_steps // 2)
        return torch.zeros_like(state.switched) if state.fitted else ~state.switched

    def missing(self, state: State, run: Run, conditional: Tensor) -> Tensor:
        """What the fit says for samples that are still guided; else the conditional output."""
        if not state.fitted or state.switched is None or bool(state.switched.all()):
            return conditional
        channels = (
            state.way.conditional[0].numel() // conditional[0, :1].numel() // len(conditional)
        )
        known = conditional[:, :channels]
        found = predict(state.parts, state.way, known).to(known.dtype)
        run.activity[f"{self.name}.fitted"] += int((~state.switched).sum())
        guided = (~state.switched).nonzero()[:, 0].to(known.device)
        made = conditional.clone()
        made[guided, :channels] = found[guided]
        return made

    def compare(
        self, state: State, run: Run, conditional: Tensor, unconditional: Tensor, step: Step
    ) -> None:
        """Compare the branches of the samples for which both ran."""
        if state.switched is None:
            self._check_steps(run)
            state.switched = torch.zeros(len(conditional), dtype=torch.bool)
        if self.linear:
            state.way.conditional.append(like(conditional, step.sample))
            state.way.unconditional.append(like(unconditional, step.sample))
        if state.fitted:
            return
        compared = ~state.switched
        found = self.cosine(run, conditional, unconditional, step)
        state.cosines.append(found.masked_fill(~compared, torch.nan))
        switching = compared & (found >= self.threshold)
        if self.threshold < NEVER and bool(switching.any()):
            count = int(switching.sum())
            state.switched = state.switched | switching
            run.activity[f"{self.name}.switched"] += count
            run.activity[f"{self.name}.switched_at_{step.index + 1}"] += count

    def _check_steps(self, run: Run) -> None:
        if self.linear and run.first + run.num_steps != self.steps:
            raise HastenError(
                f"{self.name}(linear=true, steps={self.steps}) was fitted for {self.steps} steps and this call has "
                f"{run.num_steps}; set steps={run.num_steps} and prepare it for that."
            )

    def cosine(self, run: Run, conditional: Tensor, unconditional: Tensor, step: Step) -> Tensor:
        """(samples,) cosine between both branches' predictions, on the CPU."""
        assert run.guidance is not None
        pair = [
            like(output, step.sample).double() * run.guidance.sign
            for output in (conditional, unconditional)
        ]
        if self.compare_as != "output":
            level, sample = run.level(step), step.sample.double()
            speak = level.clean if self.compare_as == "clean" else level.noise
            pair = [speak(output, sample) for output in pair]
        first, second = (tensor.flatten(1) for tensor in pair)
        product = (first * second).sum(dim=1)
        return (product / (first.norm(dim=1) * second.norm(dim=1)).clamp(min=1e-30)).cpu()
