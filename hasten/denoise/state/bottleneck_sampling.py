"""Bottleneck Sampling: the long middle of the way is walked at a smaller size.

"Training-free Diffusion Acceleration with Bottleneck Sampling" (arXiv 2503.18940), after the paper's
description. The first steps at full size fix the layout, the middle ones run on a smaller sample, and
the last ones at full size draw details. At each switch the clean estimate is resized and noised
anew, to a level at least as high as the one that was reached, so that what resizing spoiled is drawn
again; the rest of the way is spread over a grid of its own, shifted by s' = h s / (1 + (h - 1) s).

Inferred: the shares of the steps, the levels at which stages begin, the shifts, and how samples are
resized (averages down, bicubic up). The grid of each stage is the scheduler's own curve of noise
levels over the steps that are left, so without any shift and renoising the way is the plain one.
Three stages; networks get the positions that they would have at the smaller size.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from hasten.denoise.call_settings import steps_left_out
from hasten.denoise.guidance import like
from hasten.denoise.levels import is_flow
from hasten.denoise.network import Call
from hasten.denoise.run import Run, Step
from hasten.denoise.schedule.grid import (
    check_grid,
    forget,
    set_grid,
    time_of,
    times,
    training_steps,
)
from hasten.denoise.slots import Schedule, State
from hasten.denoise.state.sizes import (
    Size,
    check_sizes,
    check_whole,
    fit,
    fresh,
    resize,
    size_of,
)
from hasten.errors import HastenError
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

SAME = 1e-9  # levels that differ by less are one


@dataclass
class Progress:
    """One call.

    Attributes:
        starts: the step at which each stage begins.
        generator: what the pipeline draws its noise with.
        sizes: full and small size, known from the first network call on.
        first: how many timesteps the call leaves out at the start, since it begins with a picture.
    """

    starts: list[int] = field(default_factory=list)
    generator: Any = None
    sizes: tuple[Size, Size] | None = None
    first: int = 0

    def stage(self, index: int) -> int:
        """Which stage a step belongs to."""
        return bisect_right(self.starts, index) - 1

    def size(self, index: int) -> Size:
        """The size at a step."""
        assert self.sizes is not None
        return self.sizes[self.stage(index) == 1]


@technique("bottleneck_sampling")
@dataclass(frozen=True, kw_only=True)
class BottleneckSampling(State, Schedule):
    """Walks the middle of the way on a smaller sample."""

    card: ClassVar[Card] = Card(
        title="Training-free Diffusion Acceleration with Bottleneck Sampling",
        paper="bottleneck_sampling",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2503.18940",
        year=2025,
        claims=(
            Claim("speed-up", 3.0, "FLUX.1-dev, ImageReward about 0.974 against about 1.0"),
            Claim("speed-up", 2.5, "HunyuanVideo, VBench quality kept"),
        ),
        neutral={
            "scale": 1.0,
            "enter_small": 0.0,
            "enter_full": 0.0,
            "shift_first": 1.0,
            "shift_small": 1.0,
            "shift_last": 1.0,
            "switch": "implied",
        },
        rival=Rival(
            "bottleneck_sampling(scale={scale}, switch=noisy)",
            "frechet",
            "resizes the noisy sample, whose noise then has the wrong strength",
        ),
        saves="tokens",
        notes=(
            "New noise enters at each switch, so pictures are not those of the plain sampler, and only "
            "measures of whole sets say whether they are as good. A network that was never trained at "
            "the smaller size draws badly there."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.STATE, Slot.SCHEDULE),
        changes=frozenset({Resource.TIMESTEPS}),
        runners=frozenset({"eager", "compiled"}),
    )

    scale: float = knob(
        0.5, "height and width of the middle stage; 1 is the full size", low=0.1, high=1.0
    )
    first: float = knob(0.1, "share of the steps before it", low=0.0, high=0.9)
    last: float = knob(0.25, "share of the steps after it", low=0.0, high=0.9)
    enter_small: float = knob(
        0.8, "noise level, 0 to 1, at which the middle stage begins, if not higher", low=0, high=1
    )
    enter_full: float = knob(
        0.5, "noise level at which the last stage begins, if it is not higher", low=0.0, high=1.0
    )
    shift_first: float = knob(
        1.0, "h of the first stage; higher spends more steps on noise", low=0.1
    )
    shift_small: float = knob(3.0, "h of the middle stage", low=0.1)
    shift_last: float = knob(1.0, "h of the last stage", low=0.1)
    switch: str = knob(
        "fresh",
        "what noise the resized clean estimate gets: fresh; the one that it had; none. noisy resizes "
        "the noisy sample itself. The last two are ablations",
        choices=("fresh", "implied", "none", "noisy"),
    )

    def most(self, shares: Any) -> float:
        """How many times cheaper the network can get: attention goes with the square of the tokens."""
        attention, tokens = shares.attention / shares.calls, self.scale**2
        middle = 1.0 - self.first - self.last
        small = (1 - attention) * tokens + attention * tokens**2
        return 1.0 / (1.0 - middle + middle * small)

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        check_grid(pipe.scheduler, self.name)
        check_sizes(self.name, pipe)

    def begin(self, run: Run, bound: Any) -> Progress:
        """See `DenoiseTechnique.begin`."""
        return Progress()

    def ask(self, state: Progress, run: Run, arguments: dict[str, Any]) -> None:
        """Note what the call's noise is drawn with."""
        state.generator = arguments.get("generator")

    # -- the grid ----------------------------------------------------------------------------------
    def plan(self, state: Progress, run: Run) -> None:
        """Give the scheduler the grids of all stages, one after the other.

        A pipeline that begins with a picture leaves the first timesteps out; those stay as they are.
        """
        state.first = steps_left_out(run.pipe, run.num_steps, run.arguments)
        steps = run.num_steps - state.first
        if steps < 3:
            raise HastenError(
                f"{self.name} needs at least 3 steps, one for each stage; this call has {steps}."
            )
        ends = max(1, round(self.first * steps)), max(1, round(self.last * steps))
        if sum(ends) >= steps:
            raise HastenError(
                f"{self.name}: first={self.first:g} and last={self.last:g} of {steps} steps leave none for the "
                "middle stage; lower one of them."
            )
        state.starts = [0, ends[0], steps - ends[1]]
        flow = is_flow(run.scheduler)
        own = [float(s) for s in run.scheduler.sigmas[:-1]] if flow else times(run.scheduler)
        curve = np.array([*own, 0.0]) / (1.0 if flow else training_steps(run.scheduler))
        walked = self.levels(curve[state.first :], state.starts)
        levels = np.concatenate([curve[: state.first], walked])
        if np.array_equal(levels, curve[:-1]):
            return
        if flow:
            knots = dict(zip(own, times(run.scheduler), strict=True))
            wanted = [knots.get(s, time_of(run.scheduler, s)) for s in levels]
            set_grid(run, wanted, sigmas=list(levels))
        else:
            set_grid(run, [s * training_steps(run.scheduler) for s in levels])

    def levels(self, curve: np.ndarray, starts: list[int]) -> np.ndarray:
        """(steps,) noise level of each step.

        Args:
            curve: (steps + 1,) levels of the plain sampler, falling to 0.
            starts: the step at which each stage begins.
        """
        steps = len(curve) - 1
        shifts = (self.shift_first, self.shift_small, self.shift_last)
        # Never more noise than the way begins with: a picture would lose more than was asked for.
        wanted = (curve[0], min(self.enter_small, curve[0]), min(self.enter_full, curve[0]))
        if self.switch == "noisy":  # goes on at the level that was reached
            wanted = (curve[0], 0.0, 0.0)
        level, found = curve[0], []
        for shift, least, start, end in zip(
            shifts, wanted, starts, [*starts[1:], steps], strict=True
        ):
            stage = stage_grid(curve, max(level, least), steps - start, shift)
            found += list(stage[: end - start])
            level = stage[end - start]
        return np.array(found)

    # -- in the loop -------------------------------------------------------------------------------
    def feed(self, state: Progress, run: Run, call: Call) -> None:
        """Make the call fit the size of its sample."""
        if state.sizes is None:
            full = size_of(call, run.pipe, self.name)
            state.sizes = full, full.scaled(self.scale)
            if self.scale < 1.0 and state.sizes[0] == state.sizes[1]:
                raise HastenError(
                    f"{self.name}: the sample has {full.grid[1]} x {full.grid[2]} units, which scale={self.scale:g} "
                    "does not make fewer; use a larger picture or a lower scale."
                )
        full, now = state.sizes[0], state.size(run.index)
        if now != full:
            fit(call, full, now)
            if run.calls == 0:
                run.activity[f"{self.name}.small_steps"] += 1

    def advance(self, state: Progress, run: Run, step: Step, solve: Any) -> Tensor:
        """Switch to the next stage after the last step of one."""
        if run.first != state.first:
            raise HastenError(
                f"{self.name} laid its stages over all but {state.first} of the timesteps, and {type(run.pipe).__name__} "
                f"leaves out {run.first}; say with strength alone where the way begins."
            )
        if run.index == 0 and run.calls:
            check_whole(self.name, run.pipe, run.call, step.sample)
        solved: Tensor = solve()  # also where it is of no use: the scheduler counts its steps
        if run.is_last or state.stage(step.index) == state.stage(step.index + 1):
            return solved
        assert state.sizes is not None
        old, new = state.size(step.index), state.size(step.index + 1)
        if self.switch == "implied" and old == new and self._arrives(run, step):
            return solved
        run.activity[f"{self.name}.switches"] += 1
        forget(run.scheduler)
        if self.switch == "noisy":
            return resize(solved, old, new)
        time = run.scheduler.timesteps[run.first + step.index + 1]
        after = run.level(Step(step.index + 1, time, step.output, step.sample, True))
        level = run.level(step)
        output, sample = like(step.output, step.sample).float(), step.sample.float()
        clean = resize(level.clean(output, sample), old, new)
        made = after.alpha * clean
        if self.switch == "fresh":
            made = made + after.sigma * fresh(clean, state.generator)
        elif self.switch == "implied":
            made = made + after.sigma * resize(level.noise(output, sample), old, new)
        return (made / after.scale).to(solved.dtype)

    def _arrives(self, run: Run, step: Step) -> bool:
        """Whether the solver went to just the level at which the next stage begins.

        It goes to the next entry of its list, and levels only ever rise at a switch.
        """
        levels = times(run.scheduler)
        here = run.first + step.index
        return levels[here + 1] < levels[here]


def stage_grid(curve: np.ndarray, start: float, steps: int, shift: float) -> np.ndarray:
    """(steps + 1,) levels from `start` down to 0, along a curve that is shifted by h first.

    Args:
        curve: (any,) falling levels of the plain sampler, the last one 0.
    """
    shifted = shift * curve / (1.0 + (shift - 1.0) * curve)
    place = np.arange(len(curve), dtype=np.float64)
    begin = float(np.interp(-start, -shifted, place))  # the curve falls, so its negative rises
    wanted = begin + (place[-1] - begin) * np.arange(steps + 1) / steps
    near = np.round(wanted)
    wanted = np.where(np.abs(wanted - near) < SAME * len(curve), near, wanted)
    grid = np.interp(wanted, place, shifted)
    on_knot = wanted == near
    grid[on_knot] = shifted[near[on_knot].astype(int)]
    grid[0] = min(start, shifted[0])
    return grid
