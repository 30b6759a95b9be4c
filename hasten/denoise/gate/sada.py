"""SADA: the bend of the trajectory says whether the next network call can be predicted.

Jiang et al., "SADA: Stability-guided Adaptive Diffusion Acceleration" (ICML 2025), after the
released code. `f` is the slope of the sample, from the output after guidance. With the second
difference `bend = f_i - 2 f_{i-1} + f_{i-2}` and the state `ahead` that three slopes foretell, the
step is stable where the mean of `(x_next - ahead) * bend` is not above zero; flow models have the
mean of `-bend` for it. After a stable step the next call is dropped: noise models keep the last
noise estimate and make the clean sample from it and `ahead`, flow models follow the last two
velocities. From `late` on one call of `late_interval` runs, and noise models get the clean sample
from a polynomial through earlier ones. Where a step is not stable, and `tokens` is above zero, the
same product says for each token whether it has to be computed at the next step.

As in the code, at skipped steps slopes are those of the last output, and after a skipped step of a
flow model the bend is that of a straight line: zero, so stable. Not as in the code: its slope has
the noise schedule's rate at one of the thousand training timesteps, so that its foretold state lies
one of those ahead and not a whole step (`reach=timestep`). By the whole step fewer calls come
nearer to the full run, and making the clean sample from `ahead` pays as the paper says it does; by
the code's it is worse than from the solver's own state. Ours: the ranges are shares of the steps,
where the code has numbers for 50; one decision, and one set of tokens, for the whole batch; the
tokens' true positions, where the code lays them out anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.blocks import BlockCall
from hasten.denoise.gate.history import Nodes, mean_part, output_for, with_mean_part
from hasten.denoise.gate.late import LateGate, Skips
from hasten.denoise.gate.token_choice import TokenCache
from hasten.denoise.levels import Level, is_flow, level
from hasten.denoise.network import Call
from hasten.denoise.run import Run, Step
from hasten.denoise.slots import Block
from hasten.denoise.state.tokens import check_tokens
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

AHEAD = (0.625, 0.75, -0.375)
"""Weights of the newest slope and the two before it in the state that they foretell."""

_NOISY = (
    "DDPM",
    "EulerAncestral",
    "KDPM2Ancestral",
    "DPMSolverSDE",
    "LCM",
    "TCD",
    "SASolver",
    "UnCLIP",
    "FlowMatchLCM",
    "LTXEulerAncestral",
)


@dataclass(kw_only=True)
class State(Skips):
    """One call.

    Attributes:
        slopes: the last three of the sample, one for each step, newest last.
        tokens: which tokens the next step computes, and what blocks made of the others.
        luck: chance for the ablation that decides at random.
        ahead: the state that is foretold for the next step, as `alpha * clean + sigma * noise`.
    """

    slopes: deque[Tensor] = field(default_factory=lambda: deque(maxlen=3))
    tokens: TokenCache
    luck: torch.Generator
    ahead: Tensor | None = None


@technique("sada")
@dataclass(frozen=True, kw_only=True)
class Sada(LateGate, Block):
    """Skips calls where the trajectory bends towards what was foretold."""

    card: ClassVar[Card] = Card(
        title="SADA: stability-guided adaptive diffusion acceleration",
        paper="sada",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://github.com/Ting-Justin-Jiang/sada-icml",
        year=2025,
        claims=(
            Claim("speed-up", 1.80, "SD-2, 50 steps"),
            Claim("speed-up", 1.86, "SDXL, 50 steps"),
            Claim("speed-up", 2.02, "FLUX.1-dev, 50 steps"),
        ),
        neutral={"end": 0.0},
        rival=Rival(
            "fewer_steps(share=0.5)",
            "psnr",
            "as many calls or more, spent as fewer uniform steps",
        ),
        saves="calls",
        notes=(
            "Its criterion is about the differential equation of the sampler, so samplers that add "
            "noise on the way are refused. Samplers of eight steps or fewer are left as they are. On "
            "flow models the criterion is the sign of one mean, and skips by chance do as well: it is "
            "what the released code has there, and Euler's own step leaves nothing better to test. On "
            "the zoo's model of noise it finds nearly every step stable; skips by chance, or of its "
            "inverse, come as near to the full run with as many calls."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.GATE,),
        reads=frozenset({Resource.TRAJECTORY}),
        changes=frozenset({Resource.EVERY_CALL}),
        needs=frozenset({Resource.TRAJECTORY}),
        runners=frozenset({"eager", "compiled"}),
    )

    start: float = knob(0.2, "share of the steps before which all run", low=0.0, high=1.0)
    end: float = knob(0.94, "share of the steps after which all run", low=0.0, high=1.0)
    max_skips: int = knob(4, "steps in a row that may be skipped; more save more", low=1, high=12)
    late: float = knob(
        0.48, "share of the steps from which one of late_interval runs", low=0.0, high=1.0
    )
    late_interval: int = knob(4, "steps to each call that runs, late", low=2, high=12)
    terms_late: int = knob(4, "clean samples that the late polynomial goes through", low=2, high=6)
    tokens: float = knob(
        0.0,
        "share of the tokens that a step may ask for where it is not skipped, beside one of nine by "
        "chance; the others keep what blocks made of them before. 0 computes all",
        low=0.0,
        high=1.0,
    )
    criterion: str = knob(
        "stable",
        "which steps are skipped: after stable ones; after unstable ones; half of them by chance. "
        "All but the first are ablations",
        choices=("stable", "unstable", "random"),
    )
    rebuild: str = knob(
        "ahead",
        "the state that the clean sample of a skipped step is made from: the foretold one; the "
        "solver's, which is an ablation",
        choices=("ahead", "current"),
    )
    reach: str = knob(
        "step",
        "how far ahead the foretold state is: at the next step; at the next training timestep, as in "
        "the released code",
        choices=("step", "timestep"),
    )
    seed: int = knob(0, "seed of what is chosen by chance", low=0)

    def terms(self) -> Contract:
        """Without its token part it leaves blocks and tokens to others."""
        if self.tokens == 0.0:
            return self.contract
        return replace(
            self.contract,
            slots=(Slot.GATE, Slot.BLOCK),
            changes=self.contract.changes | {Resource.TOKEN_SET},
            runners=frozenset({"eager"}),  # each number of tokens would be a graph of its own
        )

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        scheduler = pipe.scheduler
        name, config = type(scheduler).__name__, scheduler.config
        noisy = str(config.get("algorithm_type")).startswith("sde")
        if name.startswith(_NOISY) or noisy or config.get("stochastic_sampling"):
            raise SubjectError(
                f"sada needs a sampler that follows a differential equation, and {name} adds noise on "
                "the way; use DDIM, DPM-Solver++, UniPC, Euler or a flow-matching scheduler."
            )
        if not is_flow(scheduler) and not hasattr(scheduler, "betas"):
            raise SubjectError(
                f"sada reads the noise schedule's betas, and {name} has none; use DDIM, DPM-Solver++, "
                "UniPC, Euler or a flow-matching scheduler."
            )
        if self.tokens > 0.0:
            check_tokens(self.name, pipe)

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        luck = torch.Generator().manual_seed(self.seed)
        tokens = TokenCache(self.name, self.max_skips, self.tokens)
        return State(nodes=Nodes(self.terms_late), tokens=tokens, luck=luck)

    def decide(self, state: State, run: Run, call: Call) -> bool:
        """See `Gate.decide`; the step before has decided."""
        if state.drop:
            state.tokens.skipped(run.index)
        else:
            state.tokens.begin_step(run, self.window(run))
        return not state.drop

    def block(self, state: State, run: Run, call: BlockCall) -> Any:
        """The block on the tokens that were chosen, and what it made before of the others."""
        return state.tokens.block(run, call)

    def correct(self, state: State, run: Run, step: Step) -> Tensor:
        """The output that the solver is given: what was computed, or what stands for it."""
        flow = is_flow(run.scheduler)
        mean = mean_part(step.output, step.sample)
        output = step.output
        if step.ran:
            state.skips = 0
        if flow:
            state.slopes.append(mean)
            if not step.ran:
                newest, before = state.slopes[-2], state.slopes[-3]
                run.activity["sada.predicted"] += 1
                output = with_mean_part(2 * newest - before, output)
            return output
        here = run.level(step)
        late = self.interpolated(state, run, step)
        if late is not None:
            output = late
        elif not step.ran:
            run.activity["sada.predicted"] += 1
            if self.rebuild == "ahead":
                assert state.ahead is not None
                clean = here.clean(mean, state.ahead / here.scale)
                output = output_for(here, clean, output, step.sample)
        state.slopes.append(_slope(run, step, here, mean))
        self.add_node(state, run, step, output)
        return output

    def stepped(self, state: State, run: Run, step: Step) -> None:
        """Decide whether the next call is dropped, and else which tokens it computes."""
        if step.index not in self.window(run) or len(state.slopes) < 3:
            state.follow(False, self.max_skips)
            return
        product = self._product(state, run, step)
        wanted = self.late_rule(state, run, step)
        state.follow(self._wanted(state, product) if wanted is None else wanted, self.max_skips)
        if self.tokens > 0.0 and not state.drop:
            state.tokens.choose(product, state.luck)

    def _wanted(self, state: State, product: Tensor) -> bool:
        """Whether the criterion skips the next step."""
        if self.criterion == "random":
            return bool(torch.rand((), generator=state.luck) < 0.5)
        stable = float(product.mean()) <= 0.0
        return stable == (self.criterion == "stable")

    def _product(self, state: State, run: Run, step: Step) -> Tensor:
        """What is not above zero in the mean where the step is stable, place by place."""
        before_last, last, newest = state.slopes
        bend = newest - 2 * last + before_last
        if is_flow(run.scheduler):
            return -bend if step.ran else torch.zeros_like(bend)
        assert step.result is not None
        place = run.first + step.index
        here = run.level(step)
        after = level(run.scheduler, place + 1, run.scheduler.timesteps[place + 1])
        moved = AHEAD[0] * newest + AHEAD[1] * last + AHEAD[2] * before_last
        if self.reach == "step":
            times = run.scheduler.timesteps
            moved = moved * float(times[place] - times[place + 1])
        state.ahead = step.sample.float() * here.scale - moved
        return (step.result.float() * after.scale - state.ahead) * bend


def _slope(run: Run, step: Step, here: Level, mean: Tensor) -> Tensor:
    """How far the sample moves towards noise in one training timestep."""
    x = step.sample.float()
    beta = float(run.scheduler.betas[int(step.timestep)])
    return 0.5 * beta * (here.noise(mean, x) / here.sigma - x * here.scale)
