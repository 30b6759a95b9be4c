"""The slots of the denoise engine: what a technique may do, and when.

    schedule     which timesteps are walked
    gate         which network calls run, and what stands for those that do not
    guider       which branches of the guidance run
    block        what is reused inside the network
    attention    which keys a query reads
    state        what the network is given of the sample

The loop is the pipeline's own. A technique is asked at three points of it: when the scheduler has
made its timesteps, at each network call, and at each step of the scheduler. A slot's methods get
`state`, what the technique's own `begin` returned for this call, because technique objects hold
knobs only. `run` is the call in progress (`hasten.denoise.run.Run`). A state is begun anew for each
call, when the sample's size changes on the way, and when a pipeline walks another loop in the same
call, as for the next chunk of a clip. Few networks take techniques in some slots only
(`hasten.denoise.suits`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hasten.technique import Technique

if TYPE_CHECKING:
    from hasten.denoise.blocks import AttentionCall, BlockCall
    from hasten.denoise.network import Call
    from hasten.denoise.run import Run, Step


class DenoiseTechnique(Technique):
    """A technique of the denoise engine."""

    def check(self, pipe: Any) -> None:
        """Raise a SubjectError where the pipeline lacks what the technique needs."""

    def begin(self, run: Run, bound: Any) -> Any:
        """Make this call's state; `bound` is what `bind` returned for the model."""
        return None

    def ask(self, state: Any, run: Run, arguments: dict[str, Any]) -> None:
        """May change the arguments of the pipeline's call, by name, before it is made.

        Arguments of its own, which the pipeline does not know, it takes out.
        """

    def plan(self, state: Any, run: Run) -> None:
        """Called when the scheduler has made its timesteps, of techniques of the slots schedule and state.

        May give it others (`schedule.grid.set_grid`).
        """

    def restart(self, state: Any, run: Run, bound: Any) -> Any:
        """The state for a sample that has changed its size on the way."""
        self.finish(state, run)
        return self.begin(run, bound)

    def finish(self, state: Any, run: Run) -> None:
        """Called once when the call, or a loop of it, ends, also when it failed; for last counters."""


class Schedule(DenoiseTechnique):
    """Chooses the timesteps, in `ask` or in `plan`."""


class Gate(DenoiseTechnique):
    """Stands between the network and the solver."""

    def decide(self, state: Any, run: Run, call: Call) -> bool:
        """Whether the network runs at this step; asked once, at the step's first call.

        Not asked where no step ran before with such a call: then there is nothing to stand for it.
        All calls of a step follow it, so that the branches of the guidance stay together.
        """
        return True

    def predict(self, state: Any, run: Run, call: Call) -> Tensor:
        """What stands for the output of a call that does not run, in the output's shape.

        The output of the same call of the last step that ran, by default.
        """
        return run.computed[call.branch]

    def observe(self, state: Any, run: Run, call: Call, output: Tensor) -> None:
        """Told the output of each call that ran, as the pipeline gets it."""

    def correct(self, state: Any, run: Run, step: Step) -> Tensor:
        """The output, after guidance, that the solver is given; `step.output` as it is by default."""
        return step.output

    def stepped(self, state: Any, run: Run, step: Step) -> None:
        """Told what the solver made of the step."""


class Guider(DenoiseTechnique):
    """Leaves branches of the guidance out."""

    def wanted(self, state: Any, run: Run, call: Call) -> Tensor:
        """(samples,) whose unconditional branch runs at this step; the conditional one always does.

        Asked once a step, and only once it is known which branch is which (`run.guidance`).
        """
        raise NotImplementedError

    def compare(
        self, state: Any, run: Run, conditional: Tensor, unconditional: Tensor, step: Step
    ) -> None:
        """Told both branches' outputs after each step that ran, (samples, ...) each.

        Where the unconditional branch did not run, it is what stood for it. `step.sample` is cut to
        the samples.
        """

    def missing(self, state: Any, run: Run, conditional: Tensor) -> Tensor:
        """(samples, ...) what stands for unconditional branches that did not run.

        The conditional ones themselves by default: then whatever the pipeline makes of both is it.
        """
        return conditional


class Block(DenoiseTechnique):
    """Reuses what blocks of the network computed before.

    It is asked at each transformer block; in a U-Net, which has none, at the residual and attention
    layers of its stages that leave the sample's size alone (`blocks.layers`). What works on blocks
    of tokens only says so in `check`.
    """

    # Whether it is asked at each attention and feed-forward layer of a transformer block too.
    sublayers = False

    def block(self, state: Any, run: Run, call: BlockCall) -> Any:
        """The output of a block or of a U-Net's layer: `call.compute()`, or what stands for it."""
        return call.compute()

    def sublayer(
        self, state: Any, run: Run, key: tuple[int, str], compute: Callable[[], Any]
    ) -> Any:
        """The output of a layer inside a transformer block, before the block's gate.

        `key` is (block, name). Not asked in a U-Net.
        """
        return compute()


class Attention(DenoiseTechnique):
    """Chooses what queries read."""

    def attend(self, state: Any, run: Run, call: AttentionCall) -> Tensor:
        """(batch, heads, length, head_dim) attention over the sample's tokens and the text's.

        Asked in transformer blocks, and in the attention layers of a U-Net at each of its sizes.
        `run.layout` says how the sample's tokens lie; `call.dense()` is the network's own.
        """
        raise NotImplementedError


class State(DenoiseTechnique):
    """Changes what the network is given, and what the loop goes on with."""

    def feed(self, state: Any, run: Run, call: Call) -> None:
        """May change the call's inputs before anything else sees it."""

    def receive(self, state: Any, run: Run, call: Call, output: Tensor) -> Tensor:
        """May change the output, in the shape in which the pipeline expects it."""
        return output

    def advance(self, state: Any, run: Run, step: Step, solve: Callable[[], Tensor]) -> Tensor:
        """The sample that the loop goes on with; `solve()` is the scheduler's."""
        return solve()

    def wrap_blocks(self, state: Any, run: Run, call: BlockCall) -> Any:
        """As `Block.block`, around any technique of that slot; for tokens that are left out.

        Of a U-Net too, whose layers have no tokens.
        """
        return call.compute()
