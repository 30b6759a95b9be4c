"""Just-in-Time: early steps compute some tokens, and the velocity of the others is filled in.

"Just-in-Time: Training-Free Spatial Acceleration for Diffusion Transformers" (arXiv 2603.10744),
after the reference code. The sample keeps its size. In the first stage the blocks of the network run
on a coarse lattice of tokens and the border; each other token takes the output of the nearest one,
smoothed. At the borders of the stages tokens join where the velocity varies most, from a state that
has the clean estimate's content and the right noise. By the code a joining token moves a third of the
way to that state; by the paper it lands on it, which is the default here.

Ours: the set of tokens is one for all samples of a batch, because networks have one set of positions
for all, and follows from their mean. A token joins with the noise that the sample began with, so that
the way stays that of the full model; where sampling begins with a picture, with drawn noise. Solvers
of several steps forget their past when tokens join.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.blocks import BlockCall
from hasten.denoise.guidance import like
from hasten.denoise.levels import check_levels
from hasten.denoise.network import Call
from hasten.denoise.run import Run, Step
from hasten.denoise.schedule.grid import forget, set_grid, time_of
from hasten.denoise.slots import Schedule, State
from hasten.denoise.state.lifting import beta_quantiles, importance, lift, nearest
from hasten.denoise.state.tokens import Subset, View, check_tokens, has_frames_first
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

PURE_NOISE = 0.1  # a sample with less of the clean one in it is taken for noise


@dataclass
class Progress:
    """One call.

    Attributes:
        x: the network's input of the call in hand.
        view: how the sample is cut into tokens; None before the first call.
        active: (tokens,) which of them the network computes.
        subset: the same for the blocks; None while all are computed.
        noise: what joining tokens are noised with, in the sample's layout.
    """

    x: Tensor | None = None
    view: View | None = None
    active: Tensor | None = None
    subset: Subset | None = None
    noise: Tensor | None = None


@technique("just_in_time")
@dataclass(frozen=True, kw_only=True)
class JustInTime(State, Schedule):
    """Computes few tokens early, and more where the picture needs them."""

    card: ClassVar[Card] = Card(
        title="Just-in-Time: Training-Free Spatial Acceleration for Diffusion Transformers",
        paper="just_in_time",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2603.10744",
        year=2026,
        claims=(
            Claim("speed-up", 4.24, "FLUX.1-dev, 1024 px, 18 steps against 50 full ones"),
            Claim("speed-up", 7.07, "FLUX.1-dev, 1024 px, 11 steps against 50 full ones"),
        ),
        neutral={"coarse": 1.0, "middle": 1.0},
        rival=Rival(
            "just_in_time(coarse={coarse}, middle={middle}, landing=none)",
            "frechet",
            "tokens join as they are, with noise that does not fit and stays as speckles",
        ),
        saves="tokens",
        notes=(
            "The paper's figures count fewer steps too; at equal steps the default computes 0.65 of "
            "the tokens. A step computes the same tokens for all samples of a batch. A network that "
            "never saw sparse tokens may be brittle: on scenes-dit, of whose 256 tokens a quarter are "
            "border, it draws other pictures than the full run (19 dB at 20 steps), with 0.67 of what the "
            "captions ask for instead of 0.78, and as many token-steps spent on 12 full steps come nearer "
            "(27 dB, 0.70). Tokens that vary most are no better to join there than any. Landing exactly "
            "is nearer to what is asked for than no landing (0.67 against 0.58) and leaves no speckles, "
            "but is half a decibel further from the full run."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.STATE,),
        changes=frozenset({Resource.TOKEN_SET}),
        needs=frozenset({Resource.TIMESTEPS}),
        runners=frozenset({"eager", "compiled"}),
    )

    coarse: float = knob(0.35, "share of the tokens in the first stage", low=0.01, high=1.0)
    middle: float = knob(0.62, "share of the tokens in the second stage", low=0.01, high=1.0)
    coarse_until: float = knob(0.4, "share of the steps that the first stage takes", low=0, high=1)
    middle_until: float = knob(0.65, "share of the steps after which all tokens run", low=0, high=1)
    grow: str = knob(
        "importance",
        "which tokens join: where the velocity varies most, or any (an ablation)",
        choices=("importance", "random"),
    )
    landing: str = knob(
        "exact",
        "state of joining tokens: the clean estimate noised to the step's level; a third of the way "
        "there, as in the code; as they are (an ablation)",
        choices=("exact", "third", "none"),
    )
    sigmas: str = knob(
        "own",
        "noise levels: the scheduler's own, or quantiles of Beta(1.4, 0.425), for flows only",
        choices=("own", "beta"),
    )
    seed: int = knob(0, "seed of every random choice", low=0)

    def terms(self) -> Contract:
        """With levels of its own it fills the schedule's slot too."""
        if self.sigmas == "own":
            return self.contract
        return replace(
            self.contract,
            slots=(Slot.STATE, Slot.SCHEDULE),
            changes=self.contract.changes | {Resource.TIMESTEPS},
        )

    def most(self, shares: Any) -> float:
        """How many times cheaper the network can get: attention goes with the square of the tokens."""
        parts = (self.coarse_until, self.middle_until - self.coarse_until, 1 - self.middle_until)
        ratios = (self.coarse, self.middle, 1.0)
        attention = shares.attention / shares.calls
        pairs = list(zip(parts, ratios, strict=True))
        linear, square = (sum(max(p, 0.0) * r**power for p, r in pairs) for power in (1, 2))
        return 1.0 / ((1 - attention) * linear + attention * square)

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        check_tokens(self.name, pipe)
        check_levels(pipe.scheduler, self.name)
        if getattr(pipe, "controlnet", None) is not None:
            raise SubjectError(
                f"{self.name} leaves tokens out, and the control network of {type(pipe).__name__} adds to all of them; "
                "use its pipeline without control."
            )
        name = type(pipe.scheduler).__name__
        if name.startswith("PNDM"):
            raise SubjectError(
                f"{self.name} makes the solver begin anew where tokens join, which {name} cannot; use DDIM, "
                "DPM-Solver++, UniPC, Euler or a flow-matching scheduler."
            )

    def begin(self, run: Run, bound: Any) -> Progress:
        """See `DenoiseTechnique.begin`."""
        return Progress()

    def plan(self, state: Progress, run: Run) -> None:
        """Give a flow the levels of the paper."""
        if self.sigmas == "beta":
            if not hasattr(run.scheduler, "sigmas") or float(run.scheduler.sigmas.max()) > 1.0:
                raise SubjectError(
                    f"{self.name}(sigmas=beta) is for flows, and {type(run.scheduler).__name__} is of no flow; "
                    "use sigmas=own."
                )
            levels = beta_quantiles(run.num_steps)
            set_grid(run, [time_of(run.scheduler, s) for s in levels], sigmas=levels)

    # -- which tokens ------------------------------------------------------------------------------
    def share(self, index: int, steps: int) -> float:
        """Share of the tokens that a step computes."""
        if index < int(self.coarse_until * steps):
            return self.coarse
        return self.middle if index < int(self.middle_until * steps) else 1.0

    def lattice(self, grid: tuple[int, int, int], count: int) -> Tensor:
        """(tokens,) the first set: every second row and column, and the border; `count` of them."""
        _, height, width = grid
        rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
        chosen = (rows % 2 == 0) & (columns % 2 == 0)
        chosen |= (rows == 0) | (rows == height - 1) | (columns == 0) | (columns == width - 1)
        active = chosen.expand(grid).flatten().clone()
        luck = torch.rand(len(active), generator=torch.Generator().manual_seed(self.seed))
        order = (luck + active).argsort(descending=True)  # those of the lattice stand first
        active[:] = False
        active[order[:count]] = True
        return active

    def _activate(self, state: Progress, active: Tensor) -> None:
        assert state.view is not None
        state.active = active
        kept = active.nonzero()[:, 0]
        state.subset = None
        if len(kept) < len(active):
            state.subset = Subset(kept, nearest(kept, state.view.grid), self.name)

    # -- in the network ----------------------------------------------------------------------------
    def feed(self, state: Progress, run: Run, call: Call) -> None:
        """Keep the input at hand."""
        state.x = call.x

    def wrap_blocks(self, state: Progress, run: Run, call: BlockCall) -> Any:
        """Run a block on the tokens of the stage."""
        if state.view is None:
            self._set_up(state, run, call)
        return call.compute() if state.subset is None else state.subset.run(call)

    def _set_up(self, state: Progress, run: Run, call: BlockCall) -> None:
        assert state.x is not None
        grid = run.layout.grid(call.hidden.shape[1])
        if grid is None or len(call.hidden) != run.call.rows:
            raise SubjectError(
                f"{self.name} cannot tell how the {call.hidden.shape[1]} tokens of {type(run.pipe).__name__} lie."
            )
        state.view = View(grid, has_frames_first(state.x, run.call.module))
        count = state.view.count
        # Two at least, for some blocks take an axis of one token away.
        wanted = max(min(2, count), int(self.share(run.index, run.num_steps) * count))
        self._activate(state, self.lattice(grid, wanted))

    def receive(self, state: Progress, run: Run, call: Call, output: Tensor) -> Tensor:
        """Fill in the output of the tokens that did not run."""
        if state.subset is None:
            return output
        assert state.view is not None and state.active is not None
        left = state.view.count - len(state.subset.kept)
        run.activity[f"{self.name}.tokens_left_out"] += left * call.rows
        return self.lifted(state, output)

    def lifted(self, state: Progress, values: Tensor) -> Tensor:
        """Values of a sample with those of inactive tokens filled in from the active ones."""
        assert state.view is not None and state.active is not None and state.subset is not None
        share = float(state.active.float().mean())
        tokens = lift(state.view.tokens(values), state.subset.kept, state.subset.nearest, share)
        return state.view.sample(tokens, values)

    # -- at a step ---------------------------------------------------------------------------------
    def advance(self, state: Progress, run: Run, step: Step, solve: Any) -> Tensor:
        """Let tokens join where the next step is of another stage."""
        if state.noise is None:
            state.noise = self._first_noise(run, step)
        result: Tensor = solve()
        if state.subset is None or run.is_last:
            return result
        assert state.view is not None and state.active is not None
        if not state.view.fits(step.sample):
            raise SubjectError(
                f"{type(run.pipe).__name__} gives its network {state.view.count} tokens and its scheduler "
                f"{tuple(step.sample.shape)}, and {self.name} takes pipelines where both are one sample."
            )
        wanted = int(self.share(run.index + 1, run.num_steps) * state.view.count)
        more = wanted - int(state.active.sum())
        if more <= 0:
            return result
        new = self._joining(state, run, step, more)
        result = self._landed(state, run, step, result, new)
        self._activate(state, state.active | new)
        run.activity[f"{self.name}.joined"] += more
        forget(run.scheduler)
        return result

    def _first_noise(self, run: Run, step: Step) -> Tensor:
        level = run.level(step)
        if level.alpha <= PURE_NOISE:
            return step.sample.float() * level.scale
        drawn = torch.randn(step.sample.shape, generator=torch.Generator().manual_seed(self.seed))
        return drawn.to(step.sample.device)

    def _joining(self, state: Progress, run: Run, step: Step, more: int) -> Tensor:
        """(tokens,) those that join."""
        assert state.view is not None and state.active is not None
        if self.grow == "random":
            luck = torch.Generator().manual_seed(self.seed + 1 + run.index)
            rank = torch.rand(state.view.count, generator=luck)
        else:
            level, output = run.level(step), like(step.output, step.sample).float()
            sample = step.sample.float()
            velocity = level.noise(output, sample) - level.clean(output, sample)
            rank = importance(state.view.tokens(velocity)).cpu()
        order = rank.masked_fill(state.active, -math.inf).argsort(descending=True, stable=True)
        new = torch.zeros_like(state.active)
        new[order[:more]] = True
        return new

    def _landed(self, state: Progress, run: Run, step: Step, result: Tensor, new: Tensor) -> Tensor:
        """The sample with joining tokens in a state that fits the next step."""
        if self.landing == "none":
            return result
        assert state.view is not None and state.noise is not None
        output, sample = like(step.output, step.sample).float(), step.sample.float()
        clean = self.lifted(state, run.level(step).clean(output, sample))
        time = run.scheduler.timesteps[run.first + step.index + 1]
        after = run.level(Step(step.index + 1, time, output, sample, True))
        target = (after.alpha * clean + after.sigma * state.noise) / after.scale
        weight = 1.0 if self.landing == "exact" else 1.0 / 3.0
        mixed = result.float().lerp(target, weight)
        view, mask = state.view, new.reshape(1, *state.view.grid, 1).to(result.device)
        joined = torch.where(mask, view.tokens(mixed), view.tokens(result.float()))
        return view.sample(joined, result).to(result.dtype)
