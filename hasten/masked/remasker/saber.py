"""Saber: more tokens a pass as the text grows, and those whose ground gave way are taken back.

"Saber: An Efficient Sampling with Adaptive Acceleration and Backtracking Enhanced Remasking for
Diffusion Language Model" (arXiv 2510.18165), after the reference code. A place is fixed if it is
more confident than fixed places were on average when they were fixed, and the fixed places whose
confidence fell most in the last pass are opened again. Confidence is that of the best token of a
place now (when sampling, of the one that is drawn for it), whatever stands there. As in the code, a
place that was opened keeps its share in the average until it is fixed anew, a pass that fills the
block opens nothing, and places of earlier blocks may be opened while a later one is filled. Ours:
rows of a batch have a threshold each.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.masked.committer.parallel import count_parallel
from hasten.masked.run import Run
from hasten.masked.slots import Committer, Guess, Remasker
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

SHARE = 8  # one of so many that were fixed is opened again


@dataclass
class State:
    """One call; tensors are (batch, length).

    Attributes:
        fixed_at: confidence of a place when it was last fixed; NaN where it never was.
        before: confidence at the pass before; 0 before the first, -inf where it said nothing.
        gain: confidence now, less than before where the ground gave way; inf where unknown.
        lost: the token that a place held when it was opened again; -1 where it never was.
        luck: chance for the ablation that opens places at random.
    """

    fixed_at: Tensor
    before: Tensor
    gain: Tensor
    lost: Tensor
    luck: torch.Generator


@technique("saber")
@dataclass(frozen=True, kw_only=True)
class Saber(Committer, Remasker):
    """Fixes what beats the average of the past, and takes back what fell most."""

    card: ClassVar[Card] = Card(
        title="Saber: adaptive acceleration and backtracking enhanced remasking",
        paper="saber",
        family="dlm",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2510.18165",
        year=2025,
        claims=(
            Claim(
                "speed-up",
                2.514,
                "mean over code benchmarks, LLaDA-8B, over samplers of its kind; printed as 251.4 %",
            ),
            Claim("points of Pass@1 gained", 1.9, "mean over code benchmarks, same samplers"),
        ),
        neutral={"min_tokens": 1, "accelerate": False},
        rival=Rival(
            "saber(min_tokens={min_tokens}, backtrack=random)",
            "perplexity",
            "as many places opened again, chosen by chance",
        ),
        saves="passes",
        notes=(
            "Each pass fixes more than it opens, so a text takes at most as many passes as it has "
            "places. It asks for logits of all places from the first new one on, not of the block "
            "alone. Nothing can be streamed before the end, since any token may be taken back."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.COMMITTER, Slot.REMASKER),
        changes=frozenset({Resource.FIXED_PLACES}),
        needs=frozenset({Resource.TOKEN_INPUTS}),
        runners=frozenset({"eager", "compiled"}),
    )

    min_tokens: int = knob(
        2, "places that each pass fixes at least; half as many are opened again", low=1
    )
    accelerate: bool = knob(
        True, "also fix all places above the average confidence of those fixed so far"
    )
    backtrack: str = knob(
        "drop",
        "which places are opened again: those whose confidence fell most; the least confident; any; "
        "none. All but the first are ablations",
        choices=("drop", "confidence", "random", "none"),
    )
    seed: int = knob(0, "seed of the random choice", low=0)

    def terms(self) -> Contract:
        """Where nothing is ever opened again, what is fixed stays, and the remasker's slot is free."""
        if self.backtrack != "none" and (self.accelerate or self.min_tokens > 1):
            return self.contract
        return dataclasses.replace(
            self.contract, slots=(Slot.COMMITTER,), changes=frozenset[Resource]()
        )

    def begin(self, run: Run, bound: Any) -> State:
        """See `MaskedTechnique.begin`."""
        zeros = torch.zeros(run.tokens.shape, device=run.tokens.device)
        return State(
            fixed_at=torch.full_like(zeros, math.nan),
            before=zeros,
            gain=torch.full_like(zeros, math.inf),
            lost=torch.full_like(run.tokens, -1),
            luck=torch.Generator().manual_seed(self.seed),
        )

    def choose(self, state: State, run: Run, guess: Guess) -> Tensor:
        """The open places above the threshold, or the best ones where those are too few."""
        places = run.open
        chosen = places & (guess.confidence > self.threshold(state))
        few = chosen.sum(dim=1, keepdim=True) < self.min_tokens
        chosen = torch.where(few, run.best(guess, places, self.min_tokens), chosen)
        spoken = torch.zeros_like(places)
        spoken[:, guess.wanted] = True
        spoken &= ~run.given
        state.gain = (guess.confidence - state.before).masked_fill(~spoken, math.inf)
        # A row that waits for others to fill their block must not notice that it waits.
        now = guess.confidence.masked_fill(~spoken, -math.inf)
        state.before = torch.where(places.any(dim=1, keepdim=True), now, state.before)
        state.fixed_at = torch.where(chosen, guess.confidence, state.fixed_at)
        count_parallel(run, chosen, self.name)
        back = int((chosen & (guess.tokens == state.lost)).sum())
        if back:
            run.activity[f"{self.name}.returned"] += back
        return chosen

    def threshold(self, state: State) -> Tensor:
        """(batch, 1) mean confidence at which places of a row were fixed; 1 before any was."""
        if not self.accelerate:
            return torch.full_like(state.fixed_at[:, :1], math.inf)
        return state.fixed_at.nanmean(dim=1, keepdim=True).nan_to_num(nan=1.0)

    def reopen(self, state: State, run: Run, guess: Guess, chosen: Tensor) -> Tensor:
        """The fixed places that rank lowest, as many as `quota` says for each row."""
        fixed = ~run.masked & ~run.given & (run.columns < run.block[1])
        fixed &= run.open.any(dim=1, keepdim=True)  # what fills the block is not taken back
        order = self._rank(state, guess).masked_fill(~fixed, math.inf).argsort(dim=1, stable=True)
        place = torch.empty_like(order).scatter_(1, order, run.columns.expand_as(order))
        opened = fixed & (place < self.quota(chosen.sum(dim=1))[:, None])
        if bool(opened.any()):
            run.activity[f"{self.name}.reopened"] += int(opened.sum())
            state.lost = torch.where(opened, run.tokens, state.lost)
        return opened

    def quota(self, fixed: Tensor) -> Tensor:
        """(batch,) how many places to open after so many were fixed: always fewer."""
        if self.backtrack == "none":
            return torch.zeros_like(fixed)
        share = (fixed + SHARE - 1) // SHARE
        return share.clamp(min=self.min_tokens // 2).minimum(fixed - 1).clamp(min=0)

    def _rank(self, state: State, guess: Guess) -> Tensor:
        """(batch, length) what is lowest is opened first."""
        if self.backtrack == "random":
            return torch.rand(state.gain.shape, generator=state.luck).to(state.gain.device)
        return guess.confidence if self.backtrack == "confidence" else state.gain
