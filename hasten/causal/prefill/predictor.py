"""The small model that reads a prompt, and the linear maps from its keys and values to the base's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from hasten.causal.cache import KVCache
from hasten.causal.prefill.projections import Projected, attentions, caught, entries
from hasten.causal.runners import Block, EagerRunner
from hasten.technique import Parts


def kept_layers(num_layers: int, share: float) -> list[int]:
    """Evenly spaced layers that the auxiliary keeps, the first one always: 8 and 0.25 give 0, 4."""
    count = min(num_layers, max(1, round(num_layers * share)))
    return [index * num_layers // count for index in range(count)]


def layer_map(num_layers: int, kept: Sequence[int]) -> list[int]:
    """For each base layer, which auxiliary layer (by its index in `kept`) predicts it.

    The last kept one at or before it, so that the paper's "0.25l" on 8 layers is 0, 0, 0, 0, 1, 1, 1, 1.
    """
    return [max(i for i, layer in enumerate(kept) if layer <= base) for base in range(num_layers)]


def auxiliary(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A model of copies of the kept layers; all other weights are the base's own tensors, shared."""
    decoder = model.get_decoder()
    copied = {
        id(p)
        for index in kept
        for p in (*decoder.layers[index].parameters(), *decoder.layers[index].buffers())
    }
    # deepcopy takes what its memo holds instead of copying it: that is how weights are shared.
    memo: dict[int, object] = {
        id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in copied
    }
    config = copy.deepcopy(model.config, memo).get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    config.num_hidden_layers = len(kept)
    if kinds is not None:
        config.layer_types = [kinds[index] for index in kept]
    layers = nn.ModuleList(copy.deepcopy(decoder.layers[index], memo) for index in kept)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index  # type: ignore[assignment]
    memo[id(decoder.layers)] = layers
    return copy.deepcopy(model, memo)


def own_weights(aux: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The auxiliary's own parameters (those of its layers) by their name in the whole model."""
    own = {id(parameter) for parameter in aux.get_decoder().layers.parameters()}
    return {name: parameter for name, parameter in aux.named_parameters() if id(parameter) in own}


def mapped(read: Sequence[Projected], weights: Parts, layers: Sequence[int]) -> list[Projected]:
    """Predicted projections of every base layer from those that the auxiliary made.

    Args:
        read: the auxiliary's, layer by layer.
        weights: "key.<base layer>.weight" (out, in), ".bias" (out,), and the same for "value".
        layers: the layer map.
    """
    found = []
    for base, source in enumerate(layers):
        key, value = read[source].key, read[source].value
        assert key is not None and value is not None
        found.append(
            Projected(
                functional.linear(key, weights[f"key.{base}.weight"], weights[f"key.{base}.bias"]),
                functional.linear(
                    value, weights[f"value.{base}.weight"], weights[f"value.{base}.bias"]
                ),
            )
        )
    return found


@dataclass
class Predictor:
    """A base model's auxiliary and maps, ready to fill caches.

    Attributes:
        layers: the layer map (auxiliary layer of each base layer).
        maps: the linear maps, as `mapped` takes them.
    """

    base: PreTrainedModel
    aux: PreTrainedModel
    layers: list[int]
    maps: Parts

    @classmethod
    def build(cls, base: PreTrainedModel, share: float, parts: Parts) -> Predictor:
        """From trained parts: the maps, and "aux.<parameter>" for the auxiliary's own weights."""
        num_layers = len(attentions(base))
        kept = kept_layers(num_layers, share)
        aux = auxiliary(base, kept)
        with torch.no_grad():
            for name, parameter in own_weights(aux).items():
                parameter.copy_(parts[f"aux.{name}"])
        maps = {
            name: tensor.to(base.device, base.dtype)
            for name, tensor in parts.items()
            if not name.startswith("aux.")
        }
        return cls(base, aux, layer_map(num_layers, kept), maps)

    @torch.no_grad()
    def predict(self, block: Block) -> list[tuple[Tensor, Tensor]]:
        """The base's cache entries for a block of a prompt, (batch, kv_heads, block, head_dim) each."""
        runner = EagerRunner(self.aux)
        cache = runner.new_cache(block.tokens.shape[0], block.tokens.shape[1])
        with caught(self.aux, stop=True) as read:
            runner.forward(block, cache)
        return entries(
            self.base, mapped(read, self.maps, self.layers), block.positions.clamp(min=0)
        )

    def fill(self, cache: KVCache, block: Block) -> None:
        """Append a block's predicted entries to the base's cache and commit them."""
        predicted = self.predict(block)
        cache.open_block(block.positions, has_holes=block.has_holes)
        for layer, (key, value) in zip(cache.layers, predicted, strict=True):
            layer.update(key, value)
        cache.commit()
