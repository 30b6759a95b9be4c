"""DualFast: each noise estimate is pushed away from one that was made where there was more noise.

"DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models" (arXiv 2506.13058). An
estimate of the noise is the better the more noise there is, so an earlier one says in which
direction the error of this one lies: `eps + weight * (eps - earlier)`. The weight grows towards low
noise. The paper gives the formula and the growth; inferred are the straight ramp
`strength * (1 - t / T)`, the first step as the reference, and what follows for other solvers:

- Solvers of one step get the changed estimate in the place of the network's own.
- Solvers with a history must not see it there, or the change would add up, so they run on the
  network's own outputs, and what the first-order term gains by the change is added to their step:
  `(sigma_next - alpha_next * sigma / alpha) * weight * (eps - earlier)`. UniPC corrects each step
  from the sample before it, which would take that back; it is carried along then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hasten.denoise.gate.history import mean_part, with_mean_part
from hasten.denoise.levels import level
from hasten.denoise.run import Run, Step
from hasten.denoise.slots import Gate
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

# Solvers with a history that is a list of converted outputs, and a table of sigmas.
_MULTISTEP = ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep")
_ONE_STEP = (
    "DDIM",
    "CogVideoXDDIM",
    "DDPM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "FlowMatchEulerDiscrete",
    "LCM",
)


@dataclass
class State:
    """One call.

    Attributes:
        earlier: the noise estimate of the reference step, in float32.
        change: (step, what the solver's first-order term gains), for solvers with a history.
        carried: what was added to the sample of the step before, propagated to this one.
    """

    multistep: bool
    earlier: Tensor | None = None
    change: Tensor | None = None
    carried: Tensor | None = None


@technique("dual_fast")
@dataclass(frozen=True, kw_only=True)
class DualFast(Gate):
    """Moves each noise estimate away from an earlier one; skips nothing."""

    card: ClassVar[Card] = Card(
        title="DualFast: a mix of noise estimates against approximation error",
        paper="dual_fast",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2506.13058",
        year=2025,
        claims=(Claim("extra network calls", 0.0, "any solver it is put on"),),
        neutral={"strength": 0.0},
        rival=Rival(
            "dual_fast(strength=-0.3)",
            "frechet",
            "a pull towards the earlier estimate, which is the usual mistake in its sign",
        ),
        saves="none",
        notes=(
            "It makes samplers of few steps better and none faster: put it beside fewer_steps. It "
            "changes samples on purpose, so fidelity to the same steps without it says little; "
            "compare with a sampler of many steps. It acts like more guidance, so strong guidance "
            "and a high strength together saturate colours. On the zoo's model of noise what five steps of "
            "DDIM gain by it is within the noise; so is what the wrong sign loses, but at full strength."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.GATE,),
        reads=frozenset({Resource.TRAJECTORY}),
        needs=frozenset({Resource.TRAJECTORY}),
        runners=frozenset({"eager", "compiled"}),
    )

    strength: float = knob(
        0.3,
        "weight of the difference at the last step; below zero pulls the wrong way, as an ablation",
        low=-1.0,
        high=1.0,
    )
    reference: str = knob(
        "first", "the earlier estimate: the first step's, or the last", choices=("first", "last")
    )

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        scheduler = pipe.scheduler
        name = type(scheduler).__name__
        kinds = (*_ONE_STEP, *_MULTISTEP)
        random = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
        if name.removesuffix("Scheduler") not in kinds or random:
            shown = f"{name} with {scheduler.config.algorithm_type}" if random else name
            raise SubjectError(
                f"dual_fast does not know the first-order term of {shown}; use one of "
                f"{', '.join(kinds)}."
            )

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        return State(type(run.scheduler).__name__.startswith(_MULTISTEP))

    def correct(self, state: State, run: Run, step: Step) -> Tensor:
        """The output with the mixed noise estimate, for solvers of one step."""
        state.change = None
        if self.strength == 0.0:
            return step.output
        here = run.level(step)
        sample = step.sample.float()
        noise = here.noise(mean_part(step.output, sample), sample)
        earlier = state.earlier
        if earlier is None or self.reference == "last":
            state.earlier = noise
        weight = self.strength * (1.0 - float(step.timestep) / _last_timestep(run))
        if earlier is None or weight == 0.0:
            return step.output
        run.activity["dual_fast.mixed"] += 1
        change = weight * (noise - earlier)
        if state.multistep:
            state.change = change
            return step.output
        return with_mean_part(here.output_of_noise(noise + change, sample), step.output)

    def stepped(self, state: State, run: Run, step: Step) -> None:
        """Add what the first-order term gains to the step of a solver with a history."""
        if not state.multistep or step.result is None:
            return
        here, place = run.level(step), run.first + step.index
        after = level(run.scheduler, place + 1, 0)
        gain = None
        if state.carried is not None and _corrects(run, place):
            stays = after.sigma / here.sigma
            if not run.scheduler.predict_x0:
                stays = after.alpha / here.alpha
            gain = stays * state.carried
        if state.change is not None:
            own = (after.sigma - after.alpha * here.sigma / here.alpha) * state.change
            gain = own if gain is None else gain + own
        state.carried = gain
        if gain is not None:
            step.result = (step.result.float() + gain).to(step.result.dtype)


def _last_timestep(run: Run) -> float:
    return float(run.scheduler.config.num_train_timesteps)


def _corrects(run: Run, place: int) -> bool:
    """Whether the solver began this step by making the sample anew from the one before."""
    skipped = getattr(run.scheduler, "disable_corrector", None)
    return skipped is not None and run.index > 0 and place - 1 not in skipped
