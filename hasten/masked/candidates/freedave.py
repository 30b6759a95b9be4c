"""FreeDave: the next states of static decoding, guessed from one pass and checked together in the next.

"Free Draft-and-Verification: Toward Lossless Parallel Decoding for Diffusion Large Language Models"
(arXiv 2510.00294). A pass over a text already shows which places static decoding would fill after
the next one, if nothing changed its mind. These guesses, each with one place more than the one
before it, go through the model as one batch. Each output says what static decoding would do at that
guess, so it confirms the next guess or not, and the furthest confirmed one brings its output along.

Inferred: with a threshold, each draft after the first has one place more (the paper leaves the
number open). Drafts go on into the next blocks, as static decoding does, so that short blocks leave
room for them too; on top of a cache, and where the technique is lossy, they end with the block. A
draft that fills all places is adopted without a pass of its own.

The paper has two layouts. Drafts as a batch suit every model. Where a model sees blocks, and so the
rest of the text does not look at what is open, all drafts stand in one sequence under a mask, and
what they have in common is there once (`masked.blocks.Tree`). Ours: what lies behind the open block,
which is no more than a guess for later drafts, is asked of the fullest draft of each block alone. That
halves the tree and costs hardly a draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.masked.host import Bools, Ints, fetched, sent
from hasten.masked.run import Run
from hasten.masked.slots import Candidates, Committer, Guess
from hasten.technique import Card, Claim, Contract, Loss, Resource, Rival, Slot, knob, technique

TOP_ONE = 1.0  # no confidence exceeds it, so one place is filled at a time


@technique("freedave")
@dataclass(frozen=True, kw_only=True)
class FreeDave(Candidates, Committer):
    """Checks several steps of static decoding in one pass and keeps those that hold."""

    card: ClassVar[Card] = Card(
        title=(
            "Free Draft-and-Verification: Toward Lossless Parallel Decoding for Diffusion Large "
            "Language Models"
        ),
        paper="freedave",
        family="dlm",
        loss=Loss.EXACT,
        link="https://arxiv.org/abs/2510.00294",
        year=2025,
        claims=(
            Claim("throughput gain, at most", 3.78, "math and code benchmarks, accuracy kept"),
        ),
        neutral={"num_draft": 1},
        rival=Rival(
            "freedave(num_draft={num_draft}, checked=False)",
            "agreement",
            "keeps the furthest draft of each pass unseen, as filling so many places at once does",
        ),
        saves="passes",
        notes=(
            "The same tokens in the same order as static decoding, sampled ones too (with a seed), up "
            "to confidences that are closer than rounding: a pass over several drafts is a wider batch, "
            "which float32 rounds in its last bits and bfloat16 much earlier. Where a model sees the "
            "whole text, each pass computes num_draft times as many positions, so fewer passes are "
            "less time only where the machine has computing power to spare. Where it sees blocks, a "
            "pass computes about one block for each draft, and that pays on processors too. A "
            "threshold below 1 is lossy, and not always the same as threshold decoding. On top of a "
            "cache it is exact against the same cache alone, but for "
            "one that refreshes every so many passes."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.CANDIDATES, Slot.COMMITTER),
        needs=frozenset({Resource.FIXED_PLACES, Resource.TOKEN_INPUTS}),
        runners=frozenset({"eager", "compiled"}),
    )

    num_draft: int = knob(
        4, "next states that each pass checks; more need fewer and wider passes", low=1, high=256
    )
    threshold: float = knob(
        TOP_ONE,
        "places surer than this are filled together; 1 fills one after the other, as static does",
        low=0.0,
        high=1.0,
    )
    checked: bool = knob(
        True, "keep only drafts that hold; without, the furthest one is kept unseen"
    )

    @property
    def reach(self) -> int:  # type: ignore[override]
        """All of a draft may lie beyond the block. What is lossy stays inside, as threshold decoding."""
        return self.num_draft if self.loss_class() is Loss.EXACT else 0

    def loss_class(self) -> Loss:
        """Exact as long as one place is filled at a time and drafts are checked."""
        return Loss.EXACT if self.checked and self.threshold == TOP_ONE else Loss.LOSSY

    def choose(self, state: Any, run: Run, guess: Guess) -> Tensor:
        """(batch, length) bool, what one step without drafts fills."""
        places = run.next_open(fetched(run.tokens))
        return sent(self._step(fetched(guess.confidence), places), run.tokens.device)

    def propose(self, state: Any, run: Run, guess: Guess) -> Tensor:
        """(batch, drafts, length) ids: the next state, and it with 1, 2, ... places more."""
        tokens, confidence = fetched(run.tokens), fetched(guess.confidence)
        first = self._step(confidence, run.next_open(tokens))
        rest = run.masks_of(tokens) & (confidence > 0) & ~first  # those that something is known of
        count = 1 + min(self.num_draft - 1, int(rest.sum(axis=1).max()))
        # Block after block, and in each the surest place first.
        key = np.where(rest, 2.0 * run.block_numbers() - confidence, np.inf)
        rank = key.argsort(axis=1, kind="stable").argsort(axis=1)[:, None]
        filled = first[:, None] | (rest[:, None] & (rank < np.arange(count)[:, None]))
        drafts = np.where(filled, fetched(guess.tokens)[:, None], tokens[:, None])
        return sent(drafts, run.tokens.device)

    def verify(self, state: Any, run: Run, drafts: Tensor, guess: Guess | None) -> Tensor:
        """(batch,) the furthest draft that the guesses confirm, one after the other."""
        texts = fetched(drafts)
        if not self.checked:
            best = [texts.shape[1] - 1] * run.batch
        elif guess is None:
            best = [0] * run.batch
        else:
            known = texts[:, : guess.tokens.shape[1]]
            filled = self._step(fetched(guess.confidence), run.next_open(known))
            after = np.where(filled, fetched(guess.tokens), known)
            # All new places are compared, so the right token at the wrong place does not pass.
            later, after = texts[:, None, :, run.start :], after[:, :, None, run.start :]
            holds = ((later == after) | (later == run.mask_id)).all(axis=3)
            steps = np.triu(holds, 1).sum(axis=2)  # (batch, drafts) that each one confirms
            best = [_furthest(row) for row in steps.tolist()]
        self._count(run, texts, best)
        return torch.tensor(best, device=drafts.device)

    def _count(self, run: Run, drafts: Ints, best: list[int]) -> None:
        """Places that drafts guessed beyond the next state, and those of them that were kept."""
        kept = drafts[np.arange(run.batch), best]
        for what, reached in (("drafted", drafts[:, -1]), ("accepted", kept)):
            count = int((reached != drafts[:, 0]).sum())
            if count:
                run.activity[f"{self.name}.{what}"] += count

    def _step(self, confidence: NDArray[Any], places: Bools) -> Bools:
        """(batch, ..., length) bool, which of some places are filled next; see `Run.best`."""
        surest = np.where(places, confidence, -1.0).argmax(axis=-1)
        best = places & (np.arange(places.shape[-1]) == surest[..., None])
        if self.threshold == TOP_ONE:
            return best
        return best | (places & (confidence > self.threshold))


def _furthest(steps: list[int]) -> int:
    """How far a chain goes in which the draft at hand confirms so many of those behind it."""
    best = 0
    while best < len(steps) and steps[best]:
        best += steps[best]
    return best
