"""EasyCache: a call is skipped while the change that is expected of its output stays small.

Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive
Caching" (arXiv 2507.02860), after the released code. How much the output moves for a unit of the
input's movement is measured between calls that ran; times the input's movement since the step
before it tells how much the output would change. While the sum of that stays below a threshold the
network is not entered, and its output is taken for the input plus what the last call added to it.
The first call of a step decides for all of its calls, and each keeps a vector of its own. One
decision holds for the whole batch. Ours: the warm-up is a share of the steps; where the output has
more channels than the input (a variance) or fewer (a picture that is seen but not changed), the
channels that both have make the vector and the others stay; another network, as in pipelines with
one for high and one for low noise, is computed when it first comes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from hasten.denoise.network import Call
from hasten.denoise.run import Run
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


@dataclass
class State:
    """One call of a pipeline.

    Attributes:
        error: the relative change expected since the last step that ran.
        rate: how far the output moves for each unit that the input moves; None before it is known.
        before: the input of the step before, whether it ran or not.
        given, output: input and output of the first call of the last step that ran.
        size: mean absolute value of that output.
        vectors: what each call of the last step that ran added to its input; see `difference`.
        module: the network that made them.
    """

    error: float = 0.0
    rate: float | None = None
    before: Tensor | None = None
    given: Tensor | None = None
    output: Tensor | None = None
    size: float = 0.0
    vectors: dict[int, Tensor] = field(default_factory=dict)
    module: nn.Module | None = None


@technique("easy_cache")
@dataclass(frozen=True, kw_only=True)
class EasyCache(Gate):
    """Skips calls while the output is expected to change little, and shifts the last one along."""

    card: ClassVar[Card] = Card(
        title="EasyCache: runtime-adaptive caching",
        paper="easy_cache",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2507.02860",
        year=2025,
        claims=(
            Claim("speed-up", 2.54, "Wan2.1-1.3B, A800, VBench prompts"),
            Claim("speed-up", 2.21, "HunyuanVideo, A800"),
            Claim("PSNR", 25.24, "Wan2.1-1.3B at 2.54x, dB to the full run"),
            Claim("PSNR", 32.66, "HunyuanVideo at 2.21x, dB to the full run"),
        ),
        neutral={"threshold": 0.0},
        rival=Rival(
            "fewer_steps(share=0.5)", "psnr", "as many calls or more, spent as fewer uniform steps"
        ),
        saves="calls",
        notes=(
            "A threshold that suits one kind of model says nothing of another: outputs of an "
            "epsilon model change less than velocities do. Samplers of few steps are never skipped, "
            "since each of their steps is a large change. Its premise is that an output follows its "
            "input; velocities of a straight flow do not, and keeping the output itself "
            "(keep=output) comes as near there or nearer. Noise does not either: on the zoo's model of "
            "noise the vector loses to reuse of every second output at as many calls, and keep=output "
            "does not."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.GATE,),
        reads=frozenset({Resource.TRAJECTORY}),
        changes=frozenset({Resource.EVERY_CALL}),
        needs=frozenset({Resource.TRAJECTORY}),
        runners=frozenset({"eager", "compiled"}),
    )

    threshold: float = knob(
        0.05, "expected relative change up to which calls are skipped; higher skips more", low=0.0
    )
    warmup: float = knob(0.1, "share of the steps at the start that all run", low=0.0, high=1.0)
    keep: str = knob(
        "vector",
        "what is kept of a call: what it added to its input; its output, which is an ablation",
        choices=("vector", "output"),
    )

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        return State()

    def decide(self, state: State, run: Run, call: Call) -> bool:
        """Whether the change expected since the last computed output has become too large."""
        x, before = call.x, state.before
        state.before = x
        forced = run.index < math.ceil(self.warmup * run.num_steps) or run.is_last
        if forced or state.rate is None or before is None or call.module is not state.module:
            state.error = 0.0
            return True
        moved = _mean_size(x - before)
        if state.size > 0.0:
            state.error += state.rate * moved / state.size
        elif moved > 0.0:  # nothing to measure the change by
            state.error = math.inf
        if state.error < self.threshold:
            run.activity["easy_cache.reused"] += 1
            return False
        state.error = 0.0
        return True

    def predict(self, state: State, run: Run, call: Call) -> Tensor:
        """The input plus what the last call that ran added to it."""
        if self.keep == "output":
            return run.computed[call.branch]
        return shifted(state.vectors[call.branch], call.x)

    def observe(self, state: State, run: Run, call: Call, output: Tensor) -> None:
        """Measure how far the output moved for how far the input did."""
        x = call.x
        if call.branch == 0:
            same = state.module is call.module
            if same and state.given is not None and state.output is not None:
                moved = _mean_size(x - state.given)
                state.rate = _mean_size(output - state.output) / moved if moved > 0.0 else None
            else:
                state.rate = None
            state.given, state.output, state.module = x, output, call.module
            state.size = _mean_size(output)
        state.vectors[call.branch] = difference(output, x)


def difference(output: Tensor, given: Tensor) -> Tensor:
    """`output - given` where both have places, the output elsewhere; in the output's shape.

    Raises:
        SubjectError: where they have not the same number of axes.
    """
    vector = output.clone()
    common = _common(output, given)
    vector[common] -= given[common]
    return vector


def shifted(vector: Tensor, given: Tensor) -> Tensor:
    """The output that belongs to a vector of `difference` and another input."""
    output = vector.clone()
    common = _common(vector, given)
    output[common] += given[common].to(vector.dtype)
    return output


def _common(output: Tensor, given: Tensor) -> tuple[slice, ...]:
    if output.ndim != given.ndim:
        raise SubjectError(
            f"easy_cache adds to a network's input what it added before, and this one makes "
            f"{tuple(output.shape)} of {tuple(given.shape)}; use zeus, which needs outputs only."
        )
    return tuple(slice(min(a, b)) for a, b in zip(output.shape, given.shape, strict=True))


def _mean_size(value: Tensor) -> float:
    return float(value.abs().mean())
