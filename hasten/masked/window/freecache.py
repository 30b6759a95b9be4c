"""FreeCache: frozen keys and values of finished text, and commits that a small model approves.

"Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided Diffusion"
(arXiv 2505.21467, later named FlashDLM), after the paper and its reference code. Part A keeps what
was computed of the prompt and of finished blocks. Part B lets an autoregressive model read all
drafts of a block from left to right and fixes those up to the first that it finds unlikely; it only
approves and never writes a token of its own.

Ours: the reference code freezes a finished block as the pass saw it that filled its last place,
when its last tokens were still masks. Here the first pass of the next block computes it once more.
That costs one block of positions each, and what is kept belongs to the tokens that stand there,
however many of them were filled at the end. The drafts that are read are those of the block in hand,
not of all masks. The window counts from the block's edges, not from the last fixed token, and is off
unless asked for. A first token with nothing before it, which the guide cannot judge, counts as
approved.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hasten.causal.companion import AUTO, Companion
from hasten.masked.committer.guided import Reader, approved, open_guide
from hasten.masked.run import Run
from hasten.masked.slots import Committer, Guess, Window
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Parts,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)

UNGUIDED = ("always", "never")
RULES = ("relative", "deterministic", "top_k", "threshold", *UNGUIDED)


@dataclass
class State:
    """One call: passes so far, the first position that is not frozen, and the guide."""

    passes: int = 0
    frozen: int = 0
    reader: Reader | None = None


@technique("freecache")
@dataclass(frozen=True, kw_only=True)
class FreeCache(Window, Committer):
    """Computes finished text once, and fixes the drafts that a small model finds likely."""

    card: ClassVar[Card] = Card(
        title=(
            "Accelerating Diffusion Language Model Inference via Efficient KV Caching and Guided "
            "Diffusion"
        ),
        paper="freecache",
        family="dlm",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2505.21467",
        year=2025,
        claims=(
            Claim("speed-up, at most", 34.0, "first version, Dream-7B and LLaDA-8B, end to end"),
            Claim("speed-up, mean", 12.14, "second version, same models, reasoning benchmarks"),
        ),
        neutral={"guided": False, "cache": False},
        rival=Rival(
            "freecache(rule='always', guide='{guide}')",
            "perplexity",
            "fixes every draft of a block at once, with nobody's approval",
        ),
        saves="passes",
        notes=(
            "The guide's own passes and weights come on top and are counted apart. Its order is left "
            "to right, so what stands behind a hole in a text is not heard by it. Frozen keys and "
            "values are stale where attention sees the whole text, and exact for models that see "
            "blocks. Those need no cache of a technique: the engine keeps what stands by itself, and "
            "computes a little less than this cache does. Plain decoding of others holds no cache, so "
            "memory grows. The claims are against samplers without any cache. Where holes in texts "
            "are filled, a batch is frozen up to the first hole of any row, so a row in it may differ from the same row alone."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.WINDOW, Slot.COMMITTER),
        needs=frozenset({Resource.FIXED_PLACES}),
        runners=frozenset({"eager", "compiled"}),
    )

    guided: bool = knob(True, "let a second model approve several places a pass; else only cache")
    guide: str = knob(
        AUTO,
        "zoo name or checkpoint folder of the small autoregressive model; auto: the zoo's "
        "code-lm-small",
    )
    rule: str = knob(
        "relative",
        "when a draft is approved: among the guide's best top_k and at least ratio as likely as its "
        "best; its best; among its best; above threshold; always; never",
        choices=RULES,
    )
    top_k: int = knob(
        2, "how many of its best tokens the guide lets pass; more is faster and worse", low=1
    )
    threshold: float = knob(
        0.1, "chance that a draft must exceed, for that rule; lower is faster", low=0.0, high=1.0
    )
    ratio: float = knob(
        0.5, "chance beside the guide's best token; lower is faster and worse", low=0.0, high=1.0
    )
    cache: bool = knob(
        True, "freeze keys and values of finished text; else every pass computes all"
    )
    window: int = knob(
        0,
        "positions on both sides of the block that are computed with it; what lies further behind is "
        "read as it was. 0: none before, and all behind",
        low=0,
    )
    refresh: int = knob(0, "every so many passes all is computed again; 0 is never", low=0)

    def terms(self) -> Contract:
        """Each half takes its slot only while it is on."""
        parts = ((self.cache, Slot.WINDOW), (self.guided, Slot.COMMITTER))
        return dataclasses.replace(self.contract, slots=tuple(slot for on, slot in parts if on))

    def bind(self, model: nn.Module, parts: Parts) -> Companion | None:
        """Open the guide, once; None where nobody is asked."""
        if not self.guided or self.rule in UNGUIDED:
            return None
        assert isinstance(model, PreTrainedModel)
        return open_guide(model, self.guide, technique=self.name)

    def begin(self, run: Run, bound: Companion | None) -> State:
        """Give the guide an empty cache."""
        reader = None if bound is None else Reader(bound, run, technique=self.name)
        return State(reader=reader)

    # -- part A: the cache -------------------------------------------------------------------------
    def rows(self, state: State, run: Run) -> Tensor | None:
        """(rows,) from the last finished block, or the block in hand, to the end; None for all."""
        due = state.passes == 0 or (self.refresh > 0 and state.passes % self.refresh == 0)
        state.passes += 1
        first, end = _edges(run)
        # A shifted model speaks of the block's first place one position earlier.
        first = min(first, int(run.denoiser.sources(run.needed()).min()))
        # What the last passes computed goes along once more now that it is finished; then it stays.
        low = max(0, first - self.window)
        before, state.frozen = min(state.frozen, low), low
        if due:
            return None
        if self.window and run.denoiser.form.block_length is None:
            end = min(run.length, run.block[1] + self.window)
        skipped = run.length - (end - before)
        if skipped:
            run.activity[f"{self.name}.reused"] += run.batch * skipped
        return torch.arange(before, end, device=run.tokens.device)

    # -- part B: the guide -------------------------------------------------------------------------
    def choose(self, state: State, run: Run, guess: Guess) -> Tensor:
        """The drafts from the left up to the first that is not approved, and always the first."""
        places = run.open
        drafts = torch.where(places, guess.tokens, run.tokens)
        passing = self._judge(state, run, places, drafts)
        chosen = places & (passing | ~places).long().cumprod(dim=1).bool()
        chosen = chosen | (places & (places.long().cumsum(dim=1) == 1))
        if state.reader is not None:
            _keep_settled(state.reader, places, places & ~chosen)
        extra = int((chosen.sum(dim=1) - 1).clamp(min=0).sum())
        if extra:
            run.activity[f"{self.name}.parallel"] += extra
        return chosen

    def _judge(self, state: State, run: Run, places: Tensor, drafts: Tensor) -> Tensor:
        """(batch, length) bool, True where a draft is approved."""
        reader = state.reader
        if reader is None:
            return torch.full_like(places, self.rule == "always")
        columns = places.any(dim=0).nonzero()[:, 0]
        first, last = max(int(columns[0]), 1), int(columns[-1])
        passing = torch.ones_like(places)
        if last == 0:
            return passing
        logits = reader.read(drafts[:, :last], last - first + 1)
        passing[:, first : last + 1] = approved(
            logits,
            drafts[:, first : last + 1],
            self.rule,
            top_k=self.top_k,
            threshold=self.threshold,
            ratio=self.ratio,
        )
        passing |= run.columns <= run.pads[:, None]  # nothing stands before a row's first token
        run.activity[f"{self.name}.guide_passes"] += 1
        run.activity[f"{self.name}.guide_positions"] += run.batch * (last - reader.seen)
        return passing


def _edges(run: Run) -> tuple[int, int]:
    """The positions (first, end) that a pass must compute for the block in hand to be up to date.

    To the end of the text where attention sees all of it; where it sees blocks of its own, from the
    start of the one in which the block begins to the end of the one in which it ends.
    """
    first, end = run.block
    size = run.denoiser.form.block_length
    if size is None:
        return first, run.length
    starts = (first - run.pads) // size * size + run.pads
    ends = (end - 1 - run.pads) // size * size + size + run.pads
    return max(0, int(starts.min())), min(run.length, int(ends.max()))


def _keep_settled(reader: Reader, places: Tensor, left: Tensor) -> None:
    """Keep in the guide's cache what lies before the last fixed token of the row furthest back.

    That token itself is read again, since its output is about the first place that is left.
    """
    last = int(places.any(dim=0).nonzero()[-1])
    if last == 0:
        return  # nothing was read
    still = left.any(dim=1)
    if bool(still.any()):
        last = int(left[still].long().argmax(dim=1).min()) - 1
    reader.keep(max(last, reader.seen))
