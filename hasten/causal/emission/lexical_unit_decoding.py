"""Lexical unit decoding: a model tuned to see several tokens ahead keeps the ones that it is sure of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from hasten.causal.acceptor.plain import Tally
from hasten.causal.emission.placeholder_training import tune
from hasten.causal.emission.placeholders import PLACEHOLDER, fresh_parts, placeholder_id, tuned_copy
from hasten.causal.run import Run
from hasten.causal.runners import Output
from hasten.causal.slots import Draft, Emission, Verdict
from hasten.errors import PlanError
from hasten.preparation import Preparation
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


@dataclass
class Tuned:
    """The model that decodes, and the id of its placeholder."""

    model: PreTrainedModel
    placeholder: int


@dataclass
class State:
    """One call: the placeholder, and what it brought."""

    placeholder: int
    tally: Tally = field(default_factory=Tally)


# One copy per subject: the same parts give the same copy, however often a plan is applied, so that
# a compiled copy keeps its graphs.
_COPIES: WeakKeyDictionary[PreTrainedModel, tuple[Any, PreTrainedModel]] = WeakKeyDictionary()


def _fingerprint(model: PreTrainedModel, parts: Parts) -> tuple[float, ...]:
    """Tells whether a copy is still right: its parts, and how often the subject's tensors were written to."""
    written = sum(parameter._version for parameter in model.parameters())
    return (float(written), *(float(tensor.double().square().sum()) for tensor in parts.values()))


@technique("lexical_unit_decoding")
@dataclass(frozen=True, kw_only=True)
class LexicalUnitDecoding(Emission):
    """Predicts the next tokens in one pass, through placeholders, and keeps the sure ones unverified.

    Every pass ends in `num_draft` placeholders at the true positions of the tokens to come. The
    ordinary prediction is always taken; then those at the placeholders, one after the other, as long
    as the most likely token has at least the probability `threshold`. Placeholders leave the cache
    with the pass; accepted tokens enter it with the next one. A token that repeats the one before it
    is taken from an ordinary prediction only, as a placeholder easily stutters. When sampling, the
    ordinary prediction is sampled and the rest is taken by the same rule as in greedy decoding.

    The model is tuned to do this, on its own labels: a token is easy where the model gives it at
    least the probability `alpha`, and a unit is a token with the easy ones behind it. Half of the
    loss is on ordinary prediction.

    Source: Lexical Unit Decoding (arXiv 2405.15208), of which the labels by confidence, the
    placeholders and the confident prefix are known; the rest is inferred. Two things differ. The
    paper tunes all weights; here the update of each matrix has a low rank, so that the trained part
    is a few percent of the model's size (rank=0 tunes the matrices in full). And the token that
    ends a unit is trained as well: were only easy tokens trained, confidence would mean nothing.
    """

    card: ClassVar[Card] = Card(
        title="Decoding at the Speed of Thought: Harnessing Parallel Decoding of Lexical Units for LLMs",
        family="decoding",
        loss=Loss.LOSSY,
        paper="lexical_unit_decoding",
        link="https://arxiv.org/abs/2405.15208",
        year=2024,
        claims=(
            Claim("decoding speed-up", 1.33, "natural language, 7B to 13B, quality unchanged"),
            Claim("decoding speed-up", 1.30, "code, 7B to 13B, quality about 3 percent lower"),
        ),
        neutral={"num_draft": 0, "tuned": False},
        rival=Rival(
            "lexical_unit_decoding(num_draft={num_draft}, threshold={threshold}, tuned=False)",
            "ratio",
            "the untuned model, which has never seen a placeholder",
        ),
        saves="passes",
        trained=True,
        notes=(
            "Nothing is verified, and what decodes is a tuned copy beside the original (more memory): "
            "even at a threshold above 1, one token a pass, the ids are the tuned model's and not the "
            "original's. Each pass runs the placeholders too, which a small model on a CPU feels: "
            "tokens per pass are the upper limit of the speed-up. The default threshold follows the "
            "0.8 to 0.9 that summaries of the paper report; the zoo's code-lm is rarely as sure of "
            "what lies ahead, and gains little."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.EMISSION, Slot.DRAFTER, Slot.ACCEPTOR),
        changes=frozenset({Resource.ONE_TOKEN_PASSES}),
        runners=frozenset({"eager", "compiled"}),
    )
    part_knobs: ClassVar[tuple[str, ...]] = ("alpha", "rank")

    num_draft: int = knob(
        3,
        "placeholders per pass; more may be accepted, each pass costs more; 0 is plain decoding",
        low=0,
        high=16,
    )
    threshold: float = knob(
        0.9,
        "confidence from which a prediction is kept; lower is faster and worse, above 1 keeps none",
        low=0.0,
    )
    alpha: float = knob(0.9, "training: confidence from which a token is easy", low=0.0, high=1.0)
    rank: int = knob(16, "training: rank of the updates; 0 tunes the matrices in full", low=0)
    tuned: bool = knob(True, "False decodes with the untuned model, for comparison")

    # -- training and set-up -----------------------------------------------------------------------
    def prepare(self, preparation: Preparation) -> Parts:
        """Tune on the texts for `num_draft` placeholders."""
        return tune(preparation, depth=max(1, self.num_draft), alpha=self.alpha, rank=self.rank)

    def bind(self, model: nn.Module, parts: Parts) -> Tuned:
        """The tuned copy of the model.

        Raises:
            PlanError: where the parts were trained for fewer placeholders.
        """
        assert isinstance(model, PreTrainedModel)
        if self.num_draft > int(parts["depth"]):
            raise PlanError(
                f"lexical_unit_decoding: num_draft={self.num_draft}, but the parts were trained for at most "
                f"{int(parts['depth'])}; lower it or prepare again with it."
            )
        if not self.tuned:
            untuned = fresh_parts(model, 1, torch.Generator())
            parts = {PLACEHOLDER: untuned[PLACEHOLDER]}
        fingerprint = _fingerprint(model, parts)
        known = _COPIES.get(model)
        if known is None or known[0] != fingerprint:
            known = _COPIES[model] = (fingerprint, tuned_copy(model, parts))
        return Tuned(known[1], placeholder_id(model))

    def model(self, bound: Tuned) -> PreTrainedModel:
        """See `CausalTechnique.model`."""
        return bound.model

    # -- in a call -----------------------------------------------------------------------------------
    def begin(self, run: Run, bound: Tuned) -> State:
        """See `CausalTechnique.begin`."""
        return State(bound.placeholder)

    def propose(self, state: State, run: Run) -> Draft | None:
        """Placeholders, as many in every pass; those that no token could come from are holes."""
        if self.num_draft == 0:
            return None
        tokens = run.tokens.new_full((run.batch, self.num_draft), state.placeholder)
        if run.room() <= self.num_draft:
            room = run.settings.max_new_tokens - (run.lengths - run.prompt_length)
            beyond = torch.arange(1, self.num_draft + 1, device=run.device) >= room[:, None]
            tokens = tokens.masked_fill(beyond, -1)
        return state.tally.drafting(run, Draft.chain(tokens))

    def accept(self, state: State, run: Run, draft: Draft | None, output: Output) -> Verdict:
        """The ordinary prediction, and the sure ones that follow it without a gap."""
        none = Draft.chain(run.tokens[:, :0])
        first = run.sampler.pick(run.node_scores(none, output.logits[:, :1])[:, 0])[:, None]
        if draft is None:
            return Verdict(first)
        sure, guess = output.logits[:, 1:].float().softmax(dim=-1).max(dim=-1)
        tokens = torch.cat((first, guess), dim=1)
        kept = (sure >= self.threshold) & (draft.tokens >= 0) & (guess != tokens[:, :-1])
        if (
            run.sampler.needs_prefix
        ):  # a penalty for what the tokens before it say may rule a guess out
            scores = run.node_scores(Draft.chain(tokens[:, :-1]), output.logits)
            kept &= scores[:, 1:].argmax(dim=-1) == guess
        kept = kept.long().cumprod(dim=1).bool()
        longest = int(kept.sum(dim=1).max())
        tokens[:, 1:].masked_fill_(~kept, -1)
        return Verdict(tokens[:, : 1 + longest])

    def finish(self, state: State, run: Run) -> None:
        """See `CausalTechnique.finish`."""
        state.tally.publish(run, self.name)
        if state.tally.accepted:
            passes = run.activity["passes"] * run.batch
            run.activity[f"{self.name}.tokens_per_pass"] = run.activity["emitted"] / passes  # type: ignore[assignment]
