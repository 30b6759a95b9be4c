"""The slots of the masked engine: what a technique may do, and when.

    committer    which masked places are fixed after a pass
    remasker     which fixed places are opened again
    candidates   several next states, checked in one pass
    window       which positions a pass computes; the others keep their keys and values
    embedding    what the model reads at masked places

A slot's methods get `state`, what the technique's own `begin` returned for this call, because
technique objects hold knobs only. `run` is the call in progress (`hasten.masked.run.Run`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hasten.technique import Technique

if TYPE_CHECKING:
    from hasten.masked.run import Run


@dataclass
class Guess:
    """What a pass says of a text, or of several drafts of one.

    Attributes:
        tokens: (batch, length) the best token of each place that was asked for; of drafts (batch,
            drafts, length).
        confidence: its probability, in the same shape; 0 where nothing was asked for.
        logits: (batch, wanted, vocabulary) float32, before temperature; the mask has -inf. Of drafts
            (batch, drafts, wanted, vocabulary), or (batch, rows, vocabulary) where `row` is given.
        wanted: (wanted,) the places that `logits` is about, ascending.
        row: (drafts, wanted) of drafts that share rows, the row that speaks of each place; where
            nothing is known of it, any.
    """

    tokens: Tensor
    confidence: Tensor
    logits: Tensor
    wanted: Tensor
    row: Tensor | None = None

    def unflatten(self, batch: int) -> Guess:
        """One about texts (batch * drafts, length) as one about drafts."""
        tokens, confidence, logits = (
            part.unflatten(0, (batch, -1)) for part in (self.tokens, self.confidence, self.logits)
        )
        return Guess(tokens, confidence, logits, self.wanted)

    def of(self, entries: Tensor, drafts: Tensor) -> Guess:
        """What it says of one draft (entries,) of each of the given entries of the batch."""
        where = (entries, drafts)
        if self.row is None:
            logits = self.logits[where]
        else:
            logits = self.logits[entries[:, None], self.row[drafts]]
        return Guess(self.tokens[where], self.confidence[where], logits, self.wanted)


class MaskedTechnique(Technique):
    """A technique of the masked engine."""

    def begin(self, run: Run, bound: Any) -> Any:
        """Make this call's state; `bound` is what `bind` returned for the model."""
        return None

    def finish(self, state: Any, run: Run) -> None:
        """Called once when the call ends, also when it failed; a place for last counters."""


class Committer(MaskedTechnique):
    """Chooses what is fixed."""

    def choose(self, state: Any, run: Run, guess: Guess) -> Tensor:
        """(batch, length) bool, a part of `run.open`; at least one place of each row that has any."""
        raise NotImplementedError

    def revise(self, state: Any, run: Run, logits: Tensor, wanted: Tensor) -> Tensor:
        """May change the logits (batch, wanted, vocabulary) before a guess is made of them."""
        return logits


class Remasker(MaskedTechnique):
    """Takes back what was fixed."""

    looks_back = True  # it wants a guess of all places from the first new one on, not of open ones

    def reopen(self, state: Any, run: Run, guess: Guess, chosen: Tensor) -> Tensor:
        """(batch, length) bool, places to open; called after `chosen` was fixed, if masks are left.

        Fewer than were just fixed in each row, so that every pass makes progress.
        """
        raise NotImplementedError


class Candidates(MaskedTechnique):
    """Replaces the step: proposes several next states and keeps the furthest one that holds.

    Attributes:
        reach: places that drafts fill at most beyond the block in hand.
    """

    reach = 0

    def propose(self, state: Any, run: Run, guess: Guess) -> Tensor:
        """(batch, drafts, length) ids, each draft with more places fixed than the one before it."""
        raise NotImplementedError

    def verify(self, state: Any, run: Run, drafts: Tensor, guess: Guess | None) -> Tensor:
        """(batch,) which draft is kept.

        Args:
            guess: what a pass says of the drafts, but for those at the end that leave nothing open;
                None where all of them do.
        """
        raise NotImplementedError


class Window(MaskedTechnique):
    """Lets a pass compute some positions only."""

    def rows(self, state: Any, run: Run) -> Tensor | None:
        """(rows,) ascending positions to compute, those of `run.needed()` among them; None for all."""
        raise NotImplementedError


class Embedding(MaskedTechnique):
    """Changes what the model reads."""

    def embed(self, state: Any, run: Run, tokens: Tensor, rows: Tensor | None) -> Tensor | None:
        """(batch, rows, hidden) embeddings of the tokens (batch, rows), or None for their own."""
        raise NotImplementedError

    def heed(self, state: Any, run: Run, logits: Tensor, wanted: Tensor) -> None:
        """Told what each pass says, (batch, wanted, vocabulary); a place to remember it."""
