"""dInfer: better commit rules, caches with a refreshed vicinity, and smoothed iterations.

"dInfer: An Efficient Inference Framework for Diffusion Language Models" (arXiv
2510.08666), after the paper and its reference code. Ours: the reference code fixes everything within
1e-5 of the best place, so that near ties go together; here it is exactly the best one. And a place
whose likeliest token is the mask waits there, while here the mask has no chance at all. Its loop
unrolling, CUDA graphs and parallel processors are systems work that is not part of this. Its
distilled checkpoints and the variant of the hierarchy that opens places again are not either.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hasten.masked.committer.credit import Credit
from hasten.masked.committer.parallel import above, count_parallel, spread
from hasten.masked.committer.smoothing import Smoothing
from hasten.masked.run import Run
from hasten.masked.slots import Committer, Embedding, Guess, Window
from hasten.masked.window.vicinity import Vicinity
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
    """One call: what each part that is switched on remembers."""

    credit: Credit | None
    vicinity: Vicinity | None
    smoothing: Smoothing | None


@technique("dinfer")
@dataclass(frozen=True, kw_only=True)
class DInfer(Committer, Window, Embedding):
    """Decides more places a pass, recomputes only near the block, and hands beliefs on."""

    card: ClassVar[Card] = Card(
        title="dInfer: An Efficient Inference Framework for Diffusion Language Models",
        paper="dinfer",
        family="dlm",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2510.08666",
        year=2025,
        claims=(
            Claim("tokens a second", 1100, "HumanEval, batch 1, LLaDA-MoE-7B-A1B, 8x H800"),
            Claim("tokens a second", 800, "mean of 6 benchmarks, batch 1, same model and machine"),
            Claim("speed-up over Fast-dLLM", 10.0, "similar quality, same machine"),
            Claim("speed-up over Qwen2.5-3B on vLLM", 2.0, "lower end of 2 to 3, same machine"),
        ),
        neutral={"decoder": "threshold", "threshold": 2.0, "cache": "none", "smoothing": False},
        rival=Rival(
            "confidence_threshold(threshold={threshold})",
            "ratio",
            "the same threshold over the whole text, from tokens alone",
        ),
        saves="passes",
        notes=(
            "The claims include systems work for GPUs that is not rebuilt here. Keys and values of "
            "cached positions are stale: a text differs from an uncached one even where every token "
            "is decided alone. The cache adds memory that plain decoding does not hold, and a row of "
            "a batch is recomputed until all rows are done. Smoothing helps models that tolerate "
            "mixed embeddings; it also fixes less in the first passes of a call. Caches and smoothing "
            "count the passes of the call, so a row in a batch may differ from the same row alone."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.COMMITTER, Slot.WINDOW, Slot.EMBEDDING),
        changes=frozenset({Resource.TOKEN_INPUTS}),
        runners=frozenset({"eager", "compiled"}),
    )

    decoder: str = knob(
        "hierarchical",
        "what a pass fixes: all sure places; also the best of each open stretch; all sure places "
        "where favourites gain credit; none leaves it to another technique",
        choices=("threshold", "hierarchical", "credit", "none"),
    )
    threshold: float = knob(
        0.9,
        "confidence from which a place is fixed; lower fixes more at once and is wrong more often; "
        "above 1 none is for that",
        low=0.0,
        high=2.0,
    )
    low_threshold: float = knob(
        0.4, "hierarchical: what the best of an open stretch must exceed", low=0.0, high=2.0
    )
    credit_weight: float = knob(0.7, "credit: how much it lifts the logits", low=0.0)
    credit_decay: float = knob(0.8, "credit: part that is left at the next pass", low=0.0, high=1.0)
    credit_power: float = knob(
        0.2, "credit: power of the probability that is gained; lower trusts doubtful ones", low=0.0
    )
    cache: str = knob(
        "dual",
        "keys and values that are kept: none, those before the block, or those behind it too",
        choices=("none", "prefix", "dual"),
    )
    prefix_look: int = knob(16, "positions before the block that are computed with it", low=0)
    after_look: int = knob(16, "positions behind the block, for the dual cache", low=0)
    warmup_steps: int = knob(4, "passes over everything before the cache is read", low=0)
    cache_update_freq: int = knob(
        0, "passes from one over everything to the next; 0 is at each new block only", low=0
    )
    smoothing: bool = knob(True, "open places are read with what the pass before believed of them")
    smoothing_start: float = knob(0.15, "share of the beliefs after the first pass", low=0.0)
    smoothing_growth: float = knob(0.02, "what the share gains with each pass", low=0.0)
    smoothing_limit: float = knob(0.3, "the highest share", low=0.0)
    threshold_decay: float = knob(
        0.02,
        "with smoothing the threshold starts at 1 and falls by this with each pass to its value; "
        "0 starts at the value",
        low=0.0,
        high=1.0,
    )

    def terms(self) -> Contract:
        """A part that is off frees its slot; a prefix cache takes places to stay as they are."""
        parts = {
            Slot.COMMITTER: self.decoder != "none",
            Slot.WINDOW: self.cache != "none",
            Slot.EMBEDDING: self.smoothing,
        }
        return dataclasses.replace(
            self.contract,
            slots=tuple(slot for slot, used in parts.items() if used),
            changes=self.contract.changes if self.smoothing else frozenset(),
            needs=frozenset({Resource.FIXED_PLACES} if self.cache == "prefix" else ()),
        )

    def begin(self, run: Run, bound: Any) -> State:
        """See `MaskedTechnique.begin`."""
        credit = vicinity = smoothing = None
        if self.decoder == "credit":
            credit = Credit(self.credit_weight, self.credit_decay, self.credit_power)
        if self.cache != "none":
            vicinity = Vicinity(
                keeps_behind=self.cache == "dual",
                before=self.prefix_look,
                after=self.after_look,
                warmup=self.warmup_steps,
                period=self.cache_update_freq,
            )
        if self.smoothing:
            smoothing = Smoothing(self.smoothing_start, self.smoothing_growth, self.smoothing_limit)
        return State(credit, vicinity, smoothing)

    # -- committer -----------------------------------------------------------------------------------
    def choose(self, state: State, run: Run, guess: Guess) -> Tensor:
        """The places that this pass is sure enough of."""
        threshold = self.threshold
        if state.smoothing is not None and self.threshold_decay:
            passes = state.smoothing.passes - 1  # before this one
            threshold = max(1 - self.threshold_decay * passes, threshold)
        if self.decoder == "hierarchical":
            chosen = spread(run, guess, threshold, self.low_threshold)
        else:
            chosen = above(run, guess, threshold)
        count_parallel(run, chosen, self.name)
        return chosen

    def revise(self, state: State, run: Run, logits: Tensor, wanted: Tensor) -> Tensor:
        """Logits with credit, where that is the decoder."""
        if state.credit is None:
            return logits
        fused = state.credit.fuse(logits, run.open[:, wanted], run.block)
        changed = (fused.argmax(dim=-1) != logits.argmax(dim=-1)) & run.open[:, wanted]
        if bool(changed.any()):
            run.activity[f"{self.name}.credited"] += int(changed.sum())
        return fused

    # -- window --------------------------------------------------------------------------------------
    def rows(self, state: State, run: Run) -> Tensor | None:
        """The block with its vicinity; None where everything is due."""
        assert state.vicinity is not None
        rows = state.vicinity.rows(run)
        if rows is not None and rows.numel() < run.length:
            run.activity[f"{self.name}.reused"] += run.batch * (run.length - rows.numel())
        return rows

    # -- embedding -----------------------------------------------------------------------------------
    def heed(self, state: State, run: Run, logits: Tensor, wanted: Tensor) -> None:
        """Remember what the pass says, before credit."""
        assert state.smoothing is not None
        state.smoothing.heed(logits, wanted)

    def embed(self, state: State, run: Run, tokens: Tensor, rows: Tensor | None) -> Tensor | None:
        """Embeddings in which open places hold what the pass before believed."""
        assert state.smoothing is not None
        embeddings, softened = state.smoothing.embed(run, tokens, rows)
        if softened:
            run.activity[f"{self.name}.softened"] += softened
        return embeddings
