"""Representation alignment: a model that learns to fill masks keeps the states that it had."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hasten.technique import Card, Claim, Contract, Loss, Phase, Rival, Slot, knob, technique
from hasten.training.slots import LossTerm, Step


@technique("repr_align")
@dataclass(frozen=True, kw_only=True)
class ReprAlign(LossTerm):
    """Pulls each layer's states towards those that the autoregressive model has on the whole text.

    For turning an autoregressive model into one that fills masks. The teacher is a frozen copy of
    the model before the first step; it reads the text without masks and from left to right. The
    student reads the masked text in both directions. Where the next token is masked, every layer of
    the student is to say what the same layer of the teacher says there: one minus the mean cosine.

    Source: Don't Retrain, Align (arXiv 2605.06885). The paper's path term, a second weighting of
    the ordinary loss of which it is unclear whether it counts, is left out, and so are the options
    of its code: samples of tokens and layers, kept teacher states, a weight that falls, a
    contrastive form. Which weights learn (in the paper all but embeddings and output layer) is up
    to whoever trains.
    """

    card: ClassVar[Card] = Card(
        title="Don't Retrain, Align: Adapting Autoregressive LMs to Diffusion LMs via Representation Alignment",
        family="dlm",
        loss=Loss.LOSSY,
        paper="repr_align",
        link="https://arxiv.org/abs/2605.06885",
        year=2026,
        claims=(
            Claim(
                "training speed-up",
                4.0,
                "to the quality of plain masked-diffusion adaptation, Qwen3 0.6B, at most",
            ),
        ),
        neutral={"weight": 0.0},
        rival=Rival("repr_align(weight=0.0)", "masked_loss", "plain adaptation, without the term"),
        saves="none",
        notes=(
            "The teacher's pass costs about a third of a training step more. The paper's weight is "
            "10 (1 where few weights learn); in models of a few layers, trained with Muon, that "
            "holds the ordinary loss back, and a weight of 1 gains about one percent of the loss at "
            "equal steps, which does not pay for the teacher. layers, positions and teacher hold "
            "the ablations. Another teacher, places one off, and the last layer alone at the paper's "
            "weight are clearly worse than none. Places before visible tokens ought to be, by the "
            "paper; in the small model of the tests they gain more than its own places, since the "
            "ordinary loss asks nothing of them and so is not held back."
        ),
    )
    contract: ClassVar[Contract] = Contract(slots=(Slot.LOSS,), phase=Phase.STEP)

    weight: float = knob(1.0, "of the term beside the ordinary loss; 0 is none", low=0.0)
    layers: str = knob(
        "all", "which states are aligned: those of all layers, or the last", choices=("all", "last")
    )
    positions: str = knob(
        "masked",
        "where: before masked tokens, before tokens that are not, or one place off",
        choices=("masked", "unmasked", "shifted"),
    )
    teacher: str = knob(
        "model",
        "who teaches: the model as it was, one of random weights, or the model on the masked text",
        choices=("model", "random", "blind"),
    )

    def begin(self, model: PreTrainedModel) -> PreTrainedModel | None:
        """The frozen teacher; none where the term weighs nothing."""
        if self.weight == 0:
            return None
        teacher = copy.deepcopy(model).eval().requires_grad_(False)
        if self.teacher == "random":
            with torch.random.fork_rng():
                teacher = type(model)(copy.deepcopy(model.config))
            teacher.to(model.device)  # type: ignore[arg-type]
            teacher.eval().requires_grad_(False)
        return teacher

    def term(self, state: PreTrainedModel | None, step: Step) -> Tensor:
        """`weight` times one minus the mean cosine over layers and places."""
        if state is None:
            return step.hidden[0].new_zeros(())
        return self.weight * (1.0 - self.cosines(state, step).mean())

    def cosines(self, teacher: PreTrainedModel, step: Step) -> Tensor:
        """Mean cosine of each aligned layer, (layers,) float32; the embeddings come first."""
        place = step.wanted[:, 1:]
        if self.positions == "unmasked":
            place = ~place
        ids = step.inputs if self.teacher == "blind" else step.ids
        with torch.no_grad():
            theirs = teacher.base_model(
                input_ids=ids, output_hidden_states=True, use_cache=False
            ).hidden_states
        found = []
        for ours, wanted in zip(step.hidden, theirs, strict=True):
            if self.positions == "shifted":
                wanted = wanted.roll(1, dims=1)
            a, b = (state[:, :-1][place].float() for state in (ours, wanted))
            # Where all is masked no place is before a visible token, and nothing is to be aligned.
            found.append(F.cosine_similarity(a, b, dim=-1).mean() if len(a) else a.sum() + 1.0)
        return torch.stack(found if self.layers == "all" else found[-1:])
