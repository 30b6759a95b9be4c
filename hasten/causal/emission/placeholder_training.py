"""Fine-tuning for lexical units: the model labels its own text, then learns to predict whole units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from hasten.causal.attention import Pass, engine_attention, in_flight
from hasten.causal.cache import KVCache
from hasten.causal.emission.placeholders import (
    Packed,
    fresh_parts,
    merged,
    pack,
    placeholder_id,
    wanted,
)
from hasten.causal.fitting import fit, frozen
from hasten.preparation import Preparation
from hasten.technique import Parts

CROP = 256  # tokens of one training sequence
BATCH = 4
STEPS = 1000
RATE = 2e-3
FULL_RATE = 5e-4


@dataclass
class Tuning:
    """What is trained, and on what.

    Attributes:
        depth: placeholders behind each cut.
        alpha: probability from which a token counts as easy.
    """

    model: PreTrainedModel
    depth: int
    alpha: float

    def loss(self, weights: Parts, ids: Tensor, cuts: Tensor) -> Tensor:
        """Cross-entropy on all tokens plus that on the wanted placeholders, one half each."""
        packed = pack(ids, cuts, self.depth, placeholder_id(self.model))
        logits = self.logits(merged(self.model, weights), packed)
        ordinary = functional.cross_entropy(
            logits[:, : ids.shape[1] - 1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )
        chosen = wanted(self.easy(ids), packed.targets).flatten(1)
        truth = ids[:, packed.targets.flatten()]
        ahead = functional.cross_entropy(logits[:, ids.shape[1] :][chosen].float(), truth[chosen])
        return ordinary + ahead

    @torch.no_grad()
    def easy(self, ids: Tensor) -> Tensor:
        """(batch, length) bool: the untuned model gave this token at least the probability alpha."""
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        probs = logits.float().softmax(dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        return functional.pad(probs >= self.alpha, (1, 0))

    def logits(self, tensors: dict[str, Tensor], packed: Packed) -> Tensor:
        """Logits (batch, block, vocabulary) of a packed block, run as the engine runs a drafted tree."""
        batch, block = packed.tokens.shape
        num_layers = self.model.config.get_text_config(decoder=True).num_hidden_layers
        cache = KVCache(num_layers, batch, block, packed.tokens.device)
        cache.open_block(packed.positions.expand(batch, -1), has_holes=False)
        arguments: dict[str, Any] = {
            "input_ids": packed.tokens,
            "position_ids": packed.positions,
            "past_key_values": cache,
            "use_cache": True,
        }
        current = Pass(cache, packed.positions, packed.tree)
        with engine_attention(self.model), in_flight(current):
            # Where input and output embedding are one, only the input gets the placeholder's row.
            output: Any = functional_call(self.model, tensors, (), arguments, tie_weights=False)
        return output.logits


def random_cuts(length: int, depth: int, generator: torch.Generator) -> Tensor:
    """As many cuts as give one placeholder per token, at random places, ascending."""
    places = length - depth - 1
    return torch.randperm(places, generator=generator)[: max(1, length // depth)].sort().values


def tune(preparation: Preparation, *, depth: int, alpha: float, rank: int) -> Parts:
    """The parts of lexical unit decoding for a model that itself stays as it is.

    Returns:
        bfloat16 tensors as `fresh_parts` names them, and "depth", the number of placeholders.
    """
    model = preparation.subject.model
    generator = torch.Generator().manual_seed(preparation.seed)
    length = min(CROP, preparation.subject.context or CROP)
    steps = preparation.steps or STEPS
    tuning = Tuning(model, depth, alpha)
    weights = fresh_parts(model, rank, generator)
    for tensor in weights.values():
        tensor.requires_grad_(True)
    with frozen(model):
        fit(
            weights,
            preparation.batches(length=length, batch=BATCH, steps=steps),
            lambda ids: tuning.loss(
                weights, ids, random_cuts(length, depth, generator).to(ids.device)
            ),
            steps=steps,
            rate=RATE if rank else FULL_RATE,
            tick=preparation.tick,
        )
    parts = {name: tensor.detach().bfloat16() for name, tensor in weights.items()}
    return parts | {"depth": torch.tensor(depth)}
