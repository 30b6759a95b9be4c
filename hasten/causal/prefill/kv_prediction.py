"""KV prediction: a small model reads the prompt and writes the base model's cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from hasten.causal.prefill.prediction_training import train
from hasten.causal.prefill.predictor import Predictor
from hasten.causal.prefill.projections import check
from hasten.causal.run import Run
from hasten.causal.runners import Block, Output
from hasten.causal.slots import Prefill
from hasten.preparation import Preparation
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


@technique("kv_prediction")
@dataclass(frozen=True, kw_only=True)
class KVPrediction(Prefill):
    """Lets a small copy of the model read the prompt and predict the big one's keys and values.

    The auxiliary is the base with some of its layers, trained further. Per base layer one linear map
    predicts keys and one predicts values, token by token, from those of the nearest auxiliary layer
    at or before it. Keys are predicted before key norm and rotation, which are the base's own. The
    base then reads the last prompt token only, which gives the first new token, and goes on alone.

    Source: KV Prediction for Improved Time to First Token (arXiv 2410.08391). Inferred, or other
    than there: distances are means of absolute errors; the maps start from a least-squares fit; the
    small weight on the logits' scale (z-loss) is left out; the auxiliary stops at its last key and
    value projections, as nothing behind them is read.
    """

    card: ClassVar[Card] = Card(
        title="KV Prediction for Improved Time to First Token",
        family="kv_cache",
        loss=Loss.LOSSY,
        paper="kv_prediction",
        link="https://arxiv.org/abs/2410.08391",
        year=2024,
        claims=(
            Claim(
                "relative accuracy gain at equal cost, low end",
                1.15,
                "TriviaQA, OpenELM 1.1B and 3B",
            ),
            Claim(
                "relative accuracy gain at equal cost, high end",
                1.50,
                "TriviaQA, OpenELM 1.1B and 3B",
            ),
            Claim(
                "relative accuracy gain at equal cost, up to",
                1.30,
                "HumanEval, OpenELM 1.1B and 3B",
            ),
        ),
        rival=Rival(
            "kv_prediction(aux_layers={aux_layers}, decoder='aux')",
            "perplexity",
            "the auxiliary alone, which reads the prompt at the same cost",
        ),
        saves="prefill",
        trained=True,
        notes=(
            "Saves time to the first token only; decoding is the base's and the cache is as large as "
            "before. The auxiliary's layers stay in memory beside the base. What was predicted wrongly "
            "stays wrong for the whole answer; copying from the prompt suffers most. The paper trains "
            "on some 140 billion tokens, the default here sees about a million. A prompt of one token "
            "has nothing to predict and gives the base's output exactly."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.PREFILL,),
        changes=frozenset({Resource.PROMPT_ATTENTION}),
        phase=Phase.PREFILL,
    )
    part_knobs: ClassVar[tuple[str, ...]] = ("aux_layers",)

    aux_layers: float = knob(
        0.5,
        "share of the base's layers that read the prompt; fewer is faster and drifts more",
        low=0.0,
        high=1.0,
    )
    decoder: str = knob(
        "base", "which model goes on after the prompt; aux is the small one alone, for comparison",
        choices=("base", "aux"),
    )  # fmt: skip

    def prepare(self, preparation: Preparation) -> Parts:
        """Train the auxiliary and the maps through the frozen base."""
        return train(preparation, self.aux_layers)

    def bind(self, model: nn.Module, parts: Parts) -> Predictor:
        """The auxiliary and the maps, on the base's device.

        Raises:
            SubjectError: where the family's keys are made in a way that cannot be predicted here.
        """
        assert isinstance(model, PreTrainedModel)
        check(model)
        return Predictor.build(model, self.aux_layers, parts)

    def model(self, bound: Predictor) -> PreTrainedModel | None:
        """See `CausalTechnique.model`."""
        return bound.aux if self.decoder == "aux" else None

    def begin(self, run: Run, bound: Predictor) -> Predictor:
        """See `CausalTechnique.begin`."""
        return bound

    def fill(self, state: Predictor, run: Run) -> Output:
        """Predict all of the prompt but its last token, and run the base on that one."""
        prompt = run.compose(None, is_prompt=True)
        is_predicted = (
            self.decoder == "base" and run.lane.name == "base" and prompt.tokens.shape[1] > 1
        )
        if is_predicted:
            before = Block(
                prompt.tokens[:, :-1],
                prompt.positions[:, :-1],
                has_holes=prompt.has_holes,
                is_prompt=True,
            )
            state.fill(run.lane.cache, before)
            run.lane.filled = run.lengths - 1
            run.activity["kv_prediction.tokens"] += int((before.positions >= 0).sum())
            prompt = run.compose(None)
        elif self.decoder == "aux":
            run.activity["kv_prediction.tokens"] += int((prompt.positions >= 0).sum())
        output = run.forward(prompt)
        run.commit(None)
        return output
