"""Prompt lookup: the text so far, searched for its own last words, is the draft. A plain rival.

Saxena, "Prompt Lookup Decoding" (2023), also in transformers as `prompt_lookup_num_tokens`. Of the
places where the longest end of the text stood before, the latest is taken. Ours: a place so near
the end that its continuation runs out is continued in a circle, since the text repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.causal.acceptor.plain import Tally
from hasten.causal.run import Run
from hasten.causal.slots import Draft, Drafter
from hasten.technique import Card, Contract, Loss, Resource, Slot, knob, technique


@dataclass
class State:
    """One call: what its drafts brought."""

    tally: Tally = field(default_factory=Tally)


@technique("prompt_lookup")
@dataclass(frozen=True, kw_only=True)
class PromptLookup(Drafter):
    """Drafts what followed the last time that the text ended like this."""

    card: ClassVar[Card] = Card(
        title="Prompt lookup decoding",
        family="decoding",
        loss=Loss.EXACT,
        link="https://github.com/apoorvumang/prompt-lookup-decoding",
        year=2023,
        saves="passes",
        notes=(
            "Greedy decoding gives the model's own ids, up to ties that are closer than rounding; "
            "sampling keeps its distribution. It gains where the text repeats itself (code, "
            "summaries, edits) and costs the wider passes where it does not."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.DRAFTER,),
        changes=frozenset({Resource.ONE_TOKEN_PASSES}),
        runners=frozenset({"eager", "compiled"}),
    )

    num_draft: int = knob(
        4, "tokens that each pass checks; more gain more where text repeats", low=1, high=64
    )
    max_ngram: int = knob(
        3, "tokens at the text's end that are searched for, at most", low=1, high=16
    )
    min_ngram: int = knob(2, "and at least; fewer find more places, and worse ones", low=1, high=16)

    def begin(self, run: Run, bound: Any) -> State:
        """See `CausalTechnique.begin`."""
        return State()

    def propose(self, state: State, run: Run) -> Draft | None:
        """`num_draft` tokens for every row; None where no row has been here before."""
        tokens = lookup(
            run.sequence(),
            run.pads,
            run.lengths,
            num_draft=self.num_draft,
            max_ngram=self.max_ngram,
            min_ngram=min(self.min_ngram, self.max_ngram),
        )
        return state.tally.drafting(run, None if tokens is None else Draft.chain(tokens))

    def finish(self, state: State, run: Run) -> None:
        """See `CausalTechnique.finish`."""
        state.tally.publish(run, self.name)


def lookup(
    tokens: Tensor, pads: Tensor, lengths: Tensor, *, num_draft: int, max_ngram: int, min_ngram: int
) -> Tensor | None:
    """Continuations (batch, num_draft) of the latest place where the longest end stood before.

    Args:
        tokens: (batch, longest) ids; a row uses columns pads to lengths.
        max_ngram: tokens of the end that are compared.
        min_ngram: tokens that must agree; a row without such a place gets -1 throughout.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    last = lengths[:, None] - 1
    agreeing = torch.zeros_like(tokens)  # how many tokens up to here agree with the end
    so_far = columns < last  # an end must not find itself
    for back in range(max_ngram):
        behind = torch.nn.functional.pad(tokens, (back, 0))[:, : tokens.shape[1]]
        wanted = tokens.gather(1, (last - back).clamp(min=0))
        so_far = so_far & (behind == wanted) & (columns - back >= pads[:, None])
        agreeing += so_far
    place = (agreeing * tokens.shape[1] + columns).argmax(dim=1, keepdim=True)
    found = agreeing.gather(1, place) >= min_ngram
    if not bool(found.any()):
        return None
    period = torch.where(found, last - place, 1)
    steps = torch.arange(num_draft, device=tokens.device) % period
    source = torch.where(found, place + 1 + steps, 0)
    return tokens.gather(1, source).masked_fill(~found, -1)
