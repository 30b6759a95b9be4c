"""Δ-DiT: a range of blocks is left out, and what it last added to its input is added again.

"Δ-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers" (arXiv 2406.01125),
after the paper; it comes with no code. The rear blocks, which draw details, are left out in the first
part of sampling, and the front blocks, which draw outlines, in the rest.

Ours: the share of blocks and the place of the switch, which the paper gives for single models only.
The default leaves out 21 of 28 blocks at every second step, which is the paper's 1.6x. Steps are
counted where the network runs, so a gate that skips steps does not make every other one a full one.
A full step keeps the range that the steps after it will leave out; at the switch it keeps both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from hasten.denoise.block.residual import (
    Kept,
    Tokens,
    check_blocks,
    reads_back,
    through,
    tokens_of,
)
from hasten.denoise.blocks import BlockCall
from hasten.denoise.network import Call
from hasten.denoise.run import Run
from hasten.denoise.slots import Block
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Parts,
    Phase,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)

Place = tuple[int, str, int]
"""Which of the step's calls, which end of the network, and the first block that is left out."""


@dataclass
class Trail:
    """Blocks that ran one after the other: what went into the first and came out of the last."""

    start: int
    before: Tokens
    after: Tokens


@dataclass
class State:
    """One call of the pipeline.

    Attributes:
        single: each block is kept on its own, because later ones read what it puts out.
        call, network: the network call in hand, and whose residuals these are.
        step: the step in hand; `since`: steps that ran since the last full one, itself counted.
        full: whether the step in hand is a full one.
        ends: the ends of the network that a full call keeps, or the one that is left out.
        kept: what was kept.
        trails: what a full call is about to keep.
    """

    single: bool
    call: Call | None = None
    network: nn.Module | None = None
    step: int = -1
    since: int = 0
    full: bool = True
    ends: tuple[str, ...] = ()
    kept: dict[Place, Kept] = field(default_factory=dict)
    trails: dict[str, Trail] = field(default_factory=dict)


@technique("delta_dit")
@dataclass(frozen=True, kw_only=True)
class DeltaDiT(Block):
    """Leaves out rear blocks early and front blocks late, and adds what they added before."""

    card: ClassVar[Card] = Card(
        title="Δ-DiT: A Training-Free Acceleration Method Tailored for Diffusion Transformers",
        paper="delta_dit",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2406.01125",
        year=2024,
        claims=(
            Claim("speed-up", 1.6, "PixArt-alpha and DiT-XL, 20 steps, quality kept or better"),
            Claim("speed-up", 1.12, "PixArt-alpha with consistency distillation, 4 steps"),
        ),
        neutral={"interval": 1},
        rival=Rival(
            "random_block_reuse(interval={interval}, share={share})",
            "psnr",
            "as many blocks left out in the same way, drawn by chance at each step",
        ),
        saves="blocks",
        notes=(
            "Saves at most (interval - 1) / interval * share of the blocks' time. Keeps one tensor of "
            "the tokens' size for each branch of guidance, two at the switch, and one for each block "
            "where later blocks read what earlier ones put out. On scenes-dit it hardly matters which end "
            "is left out late, and which early changes the picture but not for sure how near it is to the "
            "full run's: the paper's order is no better there than any other."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.BLOCK,),
        needs=frozenset({Resource.TRAJECTORY, Resource.TOKEN_SET}),
        phase=Phase.PASS,
        runners=frozenset({"eager", "compiled"}),
    )

    interval: int = knob(
        2, "one full step in so many; higher leaves more out and drifts more", low=1
    )
    share: float = knob(
        0.75, "share of the blocks that the other steps leave out", low=0.0, high=1.0
    )
    switch: float = knob(
        0.5,
        "share of the steps after which the front is left out, not the rear",
        low=0.0,
        high=1.0,
    )
    order: str = knob(
        "staged",
        "which end is left out: the rear, then the front; the other way round; always one. All but "
        "the first are ablations",
        choices=("staged", "reversed", "front", "rear"),
    )
    keep: str = knob(
        "delta",
        "what is kept of a range: what it added, or, as an ablation, what it put out",
        choices=("delta", "output"),
    )

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        check_blocks(pipe, self.name)

    def bind(self, model: nn.Module, parts: Parts) -> bool:
        """Whether later blocks read what earlier ones put out."""
        return reads_back(model)

    def begin(self, run: Run, bound: bool) -> State:
        """Nothing is kept at first."""
        return State(single=bound)

    def most(self, shares: Any) -> float:
        """How many times cheaper the blocks get at most."""
        return 1.0 / (1.0 - (self.interval - 1) / self.interval * self.share)

    # -- which blocks ------------------------------------------------------------------------------
    def left_out(self, end: str, count: int) -> range:
        """The blocks at one end of a network of so many that a step leaves out."""
        number = round(self.share * count)
        return range(number) if end == "front" else range(count - number, count)

    def end(self, step: int, num_steps: int) -> str:
        """The end of the network that a step leaves out: "front" or "rear"."""
        if self.order in ("front", "rear"):
            return self.order
        early = step < round(self.switch * num_steps)
        return "rear" if early == (self.order == "staged") else "front"

    # -- the slot's method -------------------------------------------------------------------------
    def block(self, state: State, run: Run, call: BlockCall) -> Any:
        """See `Block.block`."""
        if state.call is not run.call:
            self._begin_call(state, run, call)
        inside = [end for end in state.ends if call.index in self.left_out(end, call.count)]
        if not inside:
            return call.compute()
        if state.full:
            return self._run(state, run, call, inside)
        kept = state.kept.get((call.branch, inside[0], call.index))
        run.activity[f"{self.name}.reused"] += 1
        if kept is None:  # in the middle of what was left out
            return through(call)
        fitting = kept.fitted(run, call)
        assert fitting is not None  # `_begin_call` saw to it
        return fitting.onto(call)

    def _begin_call(self, state: State, run: Run, call: BlockCall) -> None:
        """Decide once for all blocks of a network call."""
        if state.network is not run.call.module:  # one for high noise, one for low
            state.network, state.since = run.call.module, 0
            state.kept.clear()
        if state.step != run.index:
            state.step = run.index
            state.full = state.since % self.interval == 0
            state.since = 1 if state.full else state.since + 1
        state.call = run.call
        state.trails.clear()
        if not state.full and not self._fits(state, run, call.branch):
            state.full, state.since = True, 1
        last = run.index + self.interval - 1 if state.full else run.index
        steps = range(run.index + state.full, min(last, run.num_steps - 1) + 1)
        state.ends = tuple(dict.fromkeys(self.end(step, run.num_steps) for step in steps))
        if state.full:
            for place in [place for place in state.kept if place[0] == call.branch]:
                del state.kept[place]

    def _fits(self, state: State, run: Run, branch: int) -> bool:
        """Whether something is kept for all rows of this call."""
        end = self.end(run.index, run.num_steps)
        kept = [k for place, k in state.kept.items() if place[:2] == (branch, end)]
        return bool(kept) and all(set(run.rows) <= set(k.rows) for k in kept)

    def _run(self, state: State, run: Run, call: BlockCall, ends: list[str]) -> Any:
        """Run a block, and keep what the range adds up to and with it."""
        before = tokens_of(call)
        output = call.compute()
        after = call.parts(output)
        for end in ends:
            trail = state.trails.get(end)
            if trail is None or state.single or trail.after[0] is not before[0]:
                # The first, or something came in between, such as a control or the text's tokens.
                self._store(state, run, call.branch, end)
                trail = state.trails[end] = Trail(call.index, before, after)
            trail.after = after
            if call.index == self.left_out(end, call.count)[-1]:
                self._store(state, run, call.branch, end)
        return output

    def _store(self, state: State, run: Run, branch: int, end: str) -> None:
        trail = state.trails.pop(end, None)
        if trail is not None:
            whole = self.keep == "output"
            kept = Kept.between(run, trail.before, trail.after, whole=whole)
            state.kept[branch, end, trail.start] = kept
