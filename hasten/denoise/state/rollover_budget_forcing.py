"""Rollover budget forcing: a search over noises, which spends its evaluations where they help.

"Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing"
(arXiv 2503.19385), after the reference code. Each step towards the data is taken with new noise until
a child has a better reward than any before; what is left of the step's quota is handed on. A step
whose quota is used up goes on with its best child. The last step spends what is left. Flows have no
noise on their way, so the search walks a stochastic path with the same margins, by default one that
keeps the variance. The network's output for the reward is also what the next step is made with.

Each sample of a batch is searched by itself, chain after chain, and takes just `budget` evaluations;
a chain has an equal share of them. Ours: the last `walk` evaluations walk the winner on to the data
along the flow, because small networks predict blurred pictures from the noise at which the search
ends; at 0 the clean estimate itself is the result, as in the code. Rewards of estimates at different
noise levels are compared, as in the paper, which favours late ones.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hasten.denoise.coding import Coder
from hasten.denoise.levels import is_flow
from hasten.denoise.network import Call
from hasten.denoise.run import Run, Step
from hasten.denoise.schedule.grid import time_of
from hasten.denoise.slots import State
from hasten.denoise.state.interpolants import PATHS
from hasten.denoise.state.rewards import REWARDS
from hasten.denoise.state.search import Rule, Search
from hasten.denoise.state.searches import Progress
from hasten.denoise.state.sizes import check_alone, size_of
from hasten.denoise.state.times import EndlessLoop
from hasten.errors import HastenError, PlanError, SubjectError
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


@technique("rollover_budget_forcing")
@dataclass(frozen=True, kw_only=True)
class RolloverBudgetForcing(State):
    """Searches over noises for a higher reward, with a fixed number of evaluations."""

    card: ClassVar[Card] = Card(
        title="Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing",
        paper="rollover_budget_forcing",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2503.19385",
        year=2025,
        claims=(
            Claim(
                "evaluations of its comparisons",
                500,
                "FLUX; ahead of best of N, SMC, CoDe and SVDD",
            ),
        ),
        neutral={"path": "linear", "diffusion": 0.0},
        rival=Rival(
            "rollover_budget_forcing(budget={budget}, path=linear, reward={reward})",
            "attributes",
            "searches along the flow's own path, which leaves less room",
        ),
        saves="none",
        notes=(
            "It spends evaluations to raise a reward, so it is slower by design. The reward in the plan "
            "is a simple measure of the picture; give your own as fast(prompt, reward=function), which "
            "takes (n, 3, height, width) pictures from 0 to 1 and n prompts. A search may fool its "
            "reward: judge the result by something else. On scenes-dit at 100 evaluations, which leave "
            "two children a step, path=linear finds more of what captions ask for (0.90 of it, against "
            "0.86 here and 0.81 without a search)."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.STATE,),
        changes=frozenset({Resource.TRAJECTORY}),
        needs=frozenset({Resource.TIMESTEPS}),
        runners=frozenset({"eager", "compiled"}),
    )

    budget: int = knob(500, "network evaluations for each sample", low=1)
    chains: int = knob(2, "searches from starts of their own; the best one counts", low=1)
    draws: int = knob(25, "start noises of a chain, of which the best is taken", low=1)
    steps: int = knob(10, "times of the path at which the network is evaluated", low=2)
    path: str = knob(
        "vp",
        "which path is walked: one that keeps the variance, or the flow's own",
        choices=tuple(PATHS),
    )
    diffusion: float = knob(
        3.0, "strength of new noise, times s squared; 0 leaves no choice", low=0.0
    )
    grid: str = knob(
        "late",
        "where the times of the path lie: more of them at high noise, as in the paper; evenly",
        choices=("late", "even"),
    )
    rollover: bool = knob(True, "hand unused evaluations on, and accept the first better child")
    walk: int = knob(8, "evaluations of the budget that walk the winner on to the data", low=0)
    reward: str = knob(
        "colourfulness", "what is raised where the call gives no reward", choices=tuple(REWARDS)
    )

    @property
    def is_plain(self) -> bool:
        """Whether nothing is left to choose, and the pipeline's own sampler runs."""
        return self.path == "linear" and self.diffusion == 0.0

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        taken = inspect.signature(type(pipe).__call__).parameters
        kind = type(pipe).__name__
        if not is_flow(pipe.scheduler):
            raise SubjectError(
                f"{self.name} searches along flows, and {type(pipe.scheduler).__name__} of {kind} is of none."
            )
        if {"strength", "mask_image"} & set(taken) or getattr(pipe, "transformer_2", None):
            raise SubjectError(
                f"{self.name} begins with noise and one network, and {kind} does not; use its text-to-image pipeline."
            )
        Coder(pipe).check(self.name)
        check_alone(self.name, pipe)

    # -- a call begins -----------------------------------------------------------------------------
    def begin(self, run: Run, bound: Any) -> Progress:
        """See `DenoiseTechnique.begin`."""
        return Progress(REWARDS[self.reward], self.budget - self.walk)

    def ask(self, state: Progress, run: Run, arguments: dict[str, Any]) -> None:
        """Take the reward out, and ask for as many steps as there are evaluations."""
        given = arguments.pop("reward", None)
        if given is not None and not callable(given):
            raise HastenError(
                f"reward={given!r}; it must be a function of (n, 3, height, width) pictures and n prompts."
            )
        state.reward = given or state.reward
        if self.is_plain:
            return
        state.prompts = _prompts(arguments)
        state.generator = arguments.get("generator")
        arguments["num_inference_steps"] = self.budget
        for name in ("sigmas", "timesteps"):
            if arguments.get(name) is not None:
                raise PlanError(f"{self.name} makes the {name} itself; leave that argument out.")

    def plan(self, state: Progress, run: Run) -> None:
        """Lay out the times of the path, and let the loop go on for the whole budget."""
        if self.is_plain:
            return
        self._shares()  # a budget that is too small is refused now
        shares = [1.0 - i / self.steps for i in range(self.steps)]
        if self.grid == "late":
            shares = [math.sqrt(1.0 - (1.0 - s) ** 2) for s in shares]
        state.grid = [PATHS[self.path](s) for s in shares]
        last = state.grid[-1].t
        state.after = [last * (1.0 - (i + 1) / (self.walk + 1)) for i in range(self.walk)]
        flows = [place.t for place in state.grid] + state.after
        state.times = [time_of(run.scheduler, t) for t in flows]
        state.loop = EndlessLoop(run.scheduler, self.budget, self.name)

    def finish(self, state: Progress, run: Run) -> None:
        """Put the scheduler's list back."""
        if state.loop is not None:
            state.loop.restore()

    def _shares(self) -> tuple[list[int], int]:
        """Evaluations of each chain, and the quota of a step."""
        left = self.budget - self.walk
        share = left // self.chains
        quota = (share - self.draws) // self.steps
        if quota < 1:
            least = self.chains * (self.draws + self.steps) + self.walk
            raise HastenError(
                f"{self.name}: a budget of {self.budget} is too small for chains={self.chains}, draws={self.draws}, "
                f"steps={self.steps} and walk={self.walk}, which need {least}; raise it or lower one of them."
            )
        return [share + (i < left - share * self.chains) for i in range(self.chains)], quota

    # -- a network call ----------------------------------------------------------------------------
    def feed(self, state: Progress, run: Run, call: Call) -> None:
        """Give the network each sample's candidate, at the candidate's own time."""
        if state.loop is None:
            return
        if not state.searches:
            self._start(state, run, call)
        x, times = state.given(run.index)
        count = call.rows // len(x)
        shape = call.x.shape[1:]
        call.x = x.reshape(-1, *shape).to(call.x.dtype).repeat(count, *(1,) * len(shape))
        call.timestep = state.loop.told(call.timestep, times).repeat(count)

    def _start(self, state: Progress, run: Run, call: Call) -> None:
        size = size_of(call, run.pipe, self.name) if call.x.ndim == 3 else None
        state.coder = Coder(run.pipe, size)
        count = len(state.prompts)
        if call.rows not in (count, 2 * count):
            raise HastenError(
                f"{self.name} was given {count} prompts and the network {call.rows} rows, where it takes one or two for "
                "each; give prompts, not embeddings alone, and guide by no third branch."
            )
        shares, quota = self._shares()
        noise = call.x[:count].float()
        rule = Rule(state.grid, self.draws, quota, self.diffusion, self.rollover)
        state.searches = [Search(rule, list(shares), noise[i]) for i in range(count)]

    # -- a step ------------------------------------------------------------------------------------
    def advance(self, state: Progress, run: Run, step: Step, solve: Callable[[], Tensor]) -> Tensor:
        """Judge the candidates, and choose what each sample's search looks at next."""
        if state.loop is None:
            return solve()
        flow = step.output.float()
        run.activity[f"{self.name}.evaluations"] += len(state.searches)
        if state.end is not None:
            made = state.walk(flow, run.index)
        else:
            made = state.judge(flow, run.pipe.dtype)
            if run.index + 1 == state.until:
                made = self._end_search(state, run)
        return made.reshape(step.sample.shape).to(step.sample.dtype)

    def _end_search(self, state: Progress, run: Run) -> Tensor:
        handed_on = sum(search.rolled_over for search in state.searches)
        if handed_on:
            run.activity[f"{self.name}.rolled_over"] += handed_on
        return state.winners()


def _prompts(arguments: dict[str, Any]) -> list[str]:
    """The prompt of each sample of a pipeline's call."""
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if prompt is None:
        prompt = [""] * (1 if embeds is None else len(embeds))
    each = int(arguments.get("num_images_per_prompt") or 1)
    return [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(each)]
