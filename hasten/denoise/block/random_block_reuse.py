"""Random block reuse: at each step, blocks drawn by chance add what they added before.

A plain rival of techniques that choose with care which blocks are left out, and when.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.denoise.block.residual import Kept, check_blocks, tokens_of
from hasten.denoise.blocks import BlockCall
from hasten.denoise.run import Run
from hasten.denoise.slots import Block
from hasten.technique import Card, Contract, Loss, Phase, Resource, Slot, knob, technique


@dataclass
class State:
    """One call of the pipeline: the chance, the blocks drawn for the step, and what each added."""

    luck: torch.Generator
    step: int = -1
    network: nn.Module | None = None
    drawn: frozenset[int] = frozenset()
    kept: dict[tuple[int, int], Kept] = field(default_factory=dict)


@technique("random_block_reuse")
@dataclass(frozen=True, kw_only=True)
class RandomBlockReuse(Block):
    """Leaves out random blocks, and adds what they added when they last ran."""

    card: ClassVar[Card] = Card(
        title="Random blocks add what they added before",
        family="diffusion",
        loss=Loss.LOSSY,
        neutral={"share": 0.0},
        saves="blocks",
        notes="A baseline. It leaves out as many blocks as delta_dit with the same knobs.",
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.BLOCK,),
        needs=frozenset({Resource.TRAJECTORY, Resource.TOKEN_SET}),
        phase=Phase.PASS,
        runners=frozenset({"eager", "compiled"}),
    )

    interval: int = knob(2, "of delta_dit, of whose blocks as many are left out", low=1)
    share: float = knob(
        0.75,
        "of delta_dit, likewise; (interval - 1) / interval * share is left out",
        low=0.0,
        high=1.0,
    )
    seed: int = knob(0, "seed of the choice", low=0)

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        check_blocks(pipe, self.name)

    @property
    def left_out(self) -> float:
        """The share of the blocks that the steps behind the first leave out on average."""
        return (self.interval - 1) / self.interval * self.share

    def most(self, shares: Any) -> float:
        """How many times cheaper the blocks get at most."""
        return 1.0 / (1.0 - self.left_out)

    def begin(self, run: Run, bound: Any) -> State:
        """See `DenoiseTechnique.begin`."""
        return State(torch.Generator().manual_seed(self.seed))

    def block(self, state: State, run: Run, call: BlockCall) -> Any:
        """See `Block.block`."""
        if state.network is not run.call.module:
            state.network, state.kept = run.call.module, {}
        if state.step != run.index:
            order = torch.randperm(call.count, generator=state.luck)
            each = (
                self.left_out * call.count
            )  # what it lacks of a whole number, later steps make up
            number = round(each * run.index) - round(each * max(run.index - 1, 0))
            state.step, state.drawn = run.index, frozenset(order[:number].tolist())
        place = (call.branch, call.index)
        kept = state.kept.get(place) if call.index in state.drawn else None
        fitting = None if kept is None else kept.fitted(run, call)
        if fitting is not None:
            run.activity[f"{self.name}.reused"] += 1
            return fitting.onto(call)
        before = tokens_of(call)
        output = call.compute()
        if self.left_out > 0.0:
            state.kept[place] = Kept.between(run, before, call.parts(output))
        return output
