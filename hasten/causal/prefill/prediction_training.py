"""Training of KV prediction: the auxiliary learns to write a cache that the frozen base can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from hasten.causal.fitting import fit, frozen
from hasten.causal.prefill.predictor import auxiliary, kept_layers, layer_map, mapped, own_weights
from hasten.causal.prefill.projections import Projected, attentions, caught, check, normed, replaced
from hasten.preparation import Preparation
from hasten.technique import Parts

CROP = 256  # tokens of one training sequence
BATCH = 8
STEPS = 600
RATE = 1e-3
DECAY = 0.1  # as in the paper
START_BATCHES = 8  # batches that the maps' starting point is solved on
RIDGE = 1e-4  # of the mean square of an input, against singular systems


@dataclass
class Training:
    """The frozen base, the auxiliary's structure, and how much each term of the loss counts.

    Attributes:
        layers: the layer map.
        aux_weight: share of the auxiliary's own next-token loss.
        kv_weight: share of the distance between predicted and true keys and values.
    """

    base: PreTrainedModel
    aux: PreTrainedModel
    layers: list[int]
    aux_weight: float = 1.0
    kv_weight: float = 1.0

    @classmethod
    def of(cls, base: PreTrainedModel, share: float, **weights: float) -> Training:
        """For an auxiliary that keeps a share of the base's layers."""
        num_layers = len(attentions(base))
        kept = kept_layers(num_layers, share)
        return cls(base, auxiliary(base, kept), layer_map(num_layers, kept), **weights)

    def loss(self, weights: Parts, ids: Tensor) -> Tensor:
        """Cross-entropy of the base on predicted keys and values, and both further terms.

        Args:
            weights: as `start` makes them.
            ids: (batch, length).
        """
        cast = {name: tensor.to(self.base.dtype) for name, tensor in weights.items()}
        with torch.no_grad(), caught(self.base, stop=True) as true:
            self.base(input_ids=ids, use_cache=False)
        logits, read = self._read(cast, ids)
        predicted = mapped(read, cast, self.layers)
        with replaced(self.base, predicted):
            total = next_token_loss(self.base(input_ids=ids, use_cache=False).logits, ids)
        if self.aux_weight:
            total = total + self.aux_weight * next_token_loss(logits, ids)
        if self.kv_weight:
            total = total + self.kv_weight * self.distance(predicted, true)
        return total

    def _read(self, cast: Parts, ids: Tensor) -> tuple[Tensor, list[Projected]]:
        """The auxiliary's logits and projections with the given weights in the place of its own."""
        own = {name.removeprefix("aux."): t for name, t in cast.items() if name.startswith("aux.")}
        with caught(self.aux) as read:
            output: Any = functional_call(self.aux, own, (), {"input_ids": ids, "use_cache": False})
        return output.logits, read

    def distance(self, predicted: list[Projected], true: list[Projected]) -> Tensor:
        """Mean absolute error of keys (after the key norm, before rotation) and values, over layers."""
        errors = []
        for attention, ours, theirs in zip(attentions(self.base), predicted, true, strict=True):
            assert ours.key is not None and theirs.key is not None
            assert ours.value is not None and theirs.value is not None
            errors.append(
                functional.l1_loss(
                    normed(attention, ours.key).float(), normed(attention, theirs.key).float()
                )
            )
            errors.append(functional.l1_loss(ours.value.float(), theirs.value.float()))
        return torch.stack(errors).mean()

    # -- the starting point ------------------------------------------------------------------------
    @torch.no_grad()
    def start(self, batches: list[Tensor]) -> Parts:
        """The layers as they are in the base, and the maps that fit their keys and values best.

        Least squares, so that training starts from the best linear guess instead of from noise.
        """
        weights = {
            f"aux.{name}": p.detach().float().clone() for name, p in own_weights(self.aux).items()
        }
        sums: dict[str, Tensor] = {}
        for ids in batches:
            with caught(self.base, stop=True) as true:
                self.base(input_ids=ids, use_cache=False)
            with caught(self.aux, stop=True) as read:
                self.aux(input_ids=ids, use_cache=False)
            for side in ("key", "value"):
                for base, source in enumerate(self.layers):
                    inputs = _with_one(getattr(read[source], side))
                    outputs = getattr(true[base], side).flatten(0, 1).double()
                    for name, product in (
                        ("square", inputs.T @ inputs),
                        ("cross", inputs.T @ outputs),
                    ):
                        key = f"{side}.{base}.{name}"
                        sums[key] = sums[key] + product if key in sums else product
        for side in ("key", "value"):
            for base in range(len(self.layers)):
                square = sums[f"{side}.{base}.square"]
                ridge = (
                    RIDGE * square.diagonal().mean() * torch.eye(len(square), device=square.device)
                )
                solved = torch.linalg.solve(square + ridge, sums[f"{side}.{base}.cross"])
                weights[f"{side}.{base}.weight"] = solved[:-1].T.float().contiguous()
                weights[f"{side}.{base}.bias"] = solved[-1].float()
        return weights


def _with_one(tensor: Tensor) -> Tensor:
    """(batch, length, width) -> (batch * length, width + 1) with a column of ones, float64."""
    flat = tensor.flatten(0, 1).double()
    return torch.cat((flat, flat.new_ones(len(flat), 1)), dim=1)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of logits (batch, length, vocabulary) on the ids that follow."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(preparation: Preparation, share: float, **weights: float) -> Parts:
    """The parts of KV prediction for a base that stays as it is.

    Args:
        share: of the base's layers that the auxiliary keeps.
        weights: `aux_weight` and `kv_weight` of `Training`, both 1 as in the paper.

    Returns:
        bfloat16 tensors: "aux.<parameter>", "key.<layer>.weight" and so on.
    """
    base = preparation.subject.model
    check(base)
    steps = preparation.steps or STEPS
    with frozen(base):
        training = Training.of(base, share, **weights)
        batches = list(
            preparation.batches(length=_crop(preparation), batch=BATCH, steps=steps + START_BATCHES)
        )
        learned = training.start(batches[:START_BATCHES])
        for tensor in learned.values():
            tensor.requires_grad_(True)
        fit(
            learned,
            batches[START_BATCHES:],
            lambda ids: training.loss(learned, ids),
            steps=steps,
            rate=RATE,
            decay=DECAY,
            tick=preparation.tick,
        )
    return {name: tensor.detach().bfloat16() for name, tensor in learned.items()}


def _crop(preparation: Preparation) -> int:
    return min(CROP, preparation.subject.context or CROP)
