"""Entropy-adaptive decoding: a small model writes the easy stretches, the large one the hard ones."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hasten.causal.companion import AUTO, Companion, open_companion
from hasten.causal.run import Lane, Output, Run
from hasten.causal.slots import Controller
from hasten.errors import HastenError
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

LARGE, SMALL = "base", "small"  # names of the lanes


@dataclass
class Routing:
    """One call: recent entropies in bits, and which lane decided each pass so far."""

    companion: Companion
    entropies: deque[float]
    coin: torch.Generator
    lanes: list[str] = field(default_factory=list)
    stretch: int = 0  # passes since the last switch
    tokens: dict[str, int] = field(default_factory=lambda: {LARGE: 0, SMALL: 0})


@technique("entropy_adaptive_decoding")
@dataclass(frozen=True, kw_only=True)
class EntropyAdaptiveDecoding(Controller):
    """Chooses before each pass which of two models decides the next token, by recent entropy.

    The entropy of a token is that of the raw logits of the model that decided it, in bits, before
    temperature and penalties. Where its mean over the last `window` tokens is above `threshold`
    the large model goes on, else the small one; a stretch lasts `min_run` tokens at least. Each
    model keeps a cache of its own, and the one that takes over first reads, in the same pass, what
    the other has written (and the prompt, if it has not seen it yet). Nothing is verified.

    A batch shares its passes, so it shares the choice: the mean over its unfinished rows decides.
    Techniques of the slot `kv` that only choose what is read act on the passes of both models;
    those that are calibrated on one model say so in their contract and are refused.

    Source: arXiv 2502.06833 (entropy, window of 5, threshold with a stability constraint).
    Inferred: the exact form of that constraint, the hysteresis, that the window mixes entropies of
    both models, catching up at the switch, starting with the large model. With P the parameters
    and f the share of tokens that the large model decided, its cost model gives
    f + (1 - f) * P_small / P_large of the large model's work; catching up comes on top.
    """

    card: ClassVar[Card] = Card(
        title="Entropy Adaptive Decoding: Dynamic Model Switching for Efficient Inference",
        family="decoding",
        loss=Loss.LOSSY,
        paper="entropy_adaptive_decoding",
        link="https://arxiv.org/abs/2502.06833",
        year=2025,
        claims=(
            Claim("accuracy kept", 0.967, "MATH, Llama 11B for 43 % of the tokens"),
            Claim("compute saved", 0.415, "MATH, Llama 11B for 43 % of the tokens"),
            Claim("accuracy kept", 0.929, "MATH, Qwen2.5 14B for 25 % of the tokens"),
            Claim("compute saved", 0.67, "MATH, Qwen2.5 14B for 25 % of the tokens"),
        ),
        neutral={"threshold": -1.0},
        rival=Rival(
            "entropy_adaptive_decoding(small='{small}', rule='random', share={share})",
            "kl",
            "sends stretches to the large model by a coin",
        ),
        saves="weight_bytes",
        notes=(
            "Needs a second model with the same tokenizer. Between models of a few million "
            "parameters the fixed cost of a pass and the catching up eat most of the gain. A small "
            "model that is sure and wrong is not noticed. The right threshold depends on model and "
            "text: choose it by the share of tokens that the large model decides (large_tokens). The "
            "default suits the zoo's code models; for large models on mathematics 0.2 to 1 bit is "
            "the likely range. Past entropy says little about where the zoo's two models differ, so "
            "the lead over random routing is real but small there. share is set to what the default "
            "threshold gives on held-out code."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.CONTROLLER,),
        reads=frozenset({Resource.LOGITS}),
        changes=frozenset({Resource.MODEL_CHOICE}),
        # Tokens that an evicted entry stood for cannot be caught up with.
        needs=frozenset({Resource.KV_ENTRIES, Resource.ONE_TOKEN_PASSES}),
    )

    threshold: float = knob(
        2.5, "bits of mean entropy above which the large model decides; higher is faster, and worse",
        low=-1.0, high=math.inf,
    )  # fmt: skip
    small: str = knob(
        AUTO, "zoo name or checkpoint folder of the small model; auto: the zoo's own pair"
    )
    window: int = knob(5, "tokens over which entropy is averaged; 1 follows every token", low=1)
    min_run: int = knob(5, "tokens that a model decides at least before it is switched off", low=1)
    hysteresis: float = knob(
        0.0, "bits above the threshold that it takes to switch to the large model", low=0.0
    )
    start: str = knob(
        "large", "model that reads the prompt and decides first", choices=("large", "small")
    )
    rule: str = knob(
        "entropy", "inverted and random are rivals: the large model on low entropy, or by a coin",
        choices=("entropy", "inverted", "random"),
    )  # fmt: skip
    share: float = knob(0.65, "rule='random' only: chance of the large model", low=0.0, high=1.0)

    def bind(self, model: nn.Module, parts: Parts) -> Companion:
        """Open the small model, once."""
        assert isinstance(model, PreTrainedModel)
        return open_companion(model, self.small, technique=self.name, knob="small")

    def begin(self, run: Run, bound: Companion) -> Routing:
        """An empty window; the coin's seed comes from the call, so that a call can be repeated."""
        needed = run.last_position + 1
        if bound.context is not None and needed > bound.context:
            raise HastenError(
                f"{self.name}: the call may need {needed} tokens; the small model {bound.name} was made "
                f"for {bound.context}. Shorten the prompt or max_new_tokens."
            )
        seed = (run.settings.seed or 0) + int(run.sequence().sum())
        return Routing(bound, deque(maxlen=self.window), torch.Generator().manual_seed(seed))

    def lanes(self, state: Routing, run: Run) -> dict[str, Lane]:
        """The small model's lane, with an empty cache."""
        return {SMALL: run.new_lane(SMALL, state.companion.runner(type(run.lane.runner)))}

    def before_pass(self, state: Routing, run: Run) -> None:
        """Set the lane of the next pass; the engine's pending tokens are the catching up."""
        if not state.lanes:
            run.lane = run.lanes[LARGE if self.start == "large" else SMALL]
        elif state.stretch >= self.min_run:
            wanted = run.lanes[LARGE if self._wants_large(state, run) else SMALL]
            if wanted is not run.lane:
                self._switch(state, run, wanted)
        state.lanes.append(run.lane.name)

    def after_pass(self, state: Routing, run: Run, output: Output) -> None:
        """Note the entropy of the distribution that decided the newest tokens."""
        live = ~run.finished
        state.entropies.append(float(entropy_bits(output.logits[:, -1])[live].mean()))
        state.stretch += 1
        state.tokens[run.lane.name] += int(live.sum())

    def finish(self, state: Routing, run: Run) -> None:
        """Count, if the small model was used at all."""
        if state.tokens[SMALL]:
            run.activity[f"{self.name}.small_tokens"] += state.tokens[SMALL]
            run.activity[f"{self.name}.large_tokens"] += state.tokens[LARGE]

    def _wants_large(self, state: Routing, run: Run) -> bool:
        on_large = run.lane.name == LARGE
        if self.rule == "random":  # tossed once per `min_run` tokens, so that `share` is met
            if state.stretch % self.min_run:
                return on_large
            return float(torch.rand(1, generator=state.coin)) < self.share
        mean = sum(state.entropies) / len(state.entropies)
        stays_low = mean <= self.threshold + self.hysteresis
        if self.rule == "inverted":
            return stays_low if on_large else mean <= self.threshold
        return mean > self.threshold if on_large else not stays_low

    def _switch(self, state: Routing, run: Run, lane: Lane) -> None:
        """Change lanes and count what the incoming model has to read beside the newest token."""
        run.lane = lane
        state.stretch = 0
        unread = run.lengths - torch.maximum(lane.filled, run.pads) - 1
        run.activity[f"{self.name}.switches"] += 1
        run.activity[f"{self.name}.catch_up"] += int(unread.sum())


def entropy_bits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in bits: (..., vocabulary) -> (...), in float32."""
    return torch.special.entr(logits.float().softmax(dim=-1)).sum(dim=-1) / math.log(2)
