"""A model's key and value projections: catch what leaves them, put something else there, rotate it.

Works on every family whose attention has the layers `k_proj` and `v_proj` (and perhaps `k_norm`) and
rotates its keys by the angles of the decoder's `rotary_emb`: Llama, Qwen 2 and 3, Mistral, Gemma 3,
their mixture-of-experts relatives and others. `check` proves it on the model itself.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hasten.causal.runners import Block, EagerRunner
from hasten.errors import SubjectError

SIDES = ("k_proj", "v_proj")


@dataclass
class Projected:
    """What leaves both projections of one layer, (batch, length, kv_heads * head_dim) each."""

    key: Tensor | None = None
    value: Tensor | None = None


class _EnoughError(Exception):
    """Everything that was asked for has been seen; the rest of the pass is not needed."""


def attentions(model: PreTrainedModel) -> list[Any]:
    """The attention module of every layer.

    Raises:
        SubjectError: where a layer has no key and value projection of its own.
    """
    layers = getattr(model.get_decoder(), "layers", ())
    found = [getattr(layer, "self_attn", None) for layer in layers]
    if not found or not all(_is_supported(attention) for attention in found):
        raise SubjectError(_refusal(model))
    return found


def _is_supported(attention: nn.Module | None) -> bool:
    return attention is not None and all(
        isinstance(getattr(attention, side, None), nn.Linear) for side in SIDES
    )


def _refusal(model: PreTrainedModel) -> str:
    return (
        f"kv_prediction cannot run on {type(model).__name__}: it needs attention with a k_proj and a v_proj "
        "of its own in every layer and rotary positions, as Llama, Qwen, Mistral and Gemma 3 have; leave it out."
    )


def widths(model: PreTrainedModel) -> list[tuple[int, int]]:
    """kv_heads * head_dim of the keys and of the values, layer by layer."""
    return [(int(a.k_proj.out_features), int(a.v_proj.out_features)) for a in attentions(model)]


# -- in a pass ---------------------------------------------------------------------------------------


@contextmanager
def caught(model: PreTrainedModel, *, stop: bool = False) -> Iterator[list[Projected]]:
    """Catch what leaves the projections of every layer, before key norm and rotation.

    Args:
        stop: end the pass once all of it is known, which saves the last layer's attention and
            feed-forward part and the LM head. What the pass would return is then lost.
    """
    layers = attentions(model)
    found = [Projected() for _ in layers]

    def catch(layer: Projected, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            setattr(layer, name, output)
            if stop and layer is found[-1] and layer.key is not None and layer.value is not None:
                raise _EnoughError

        return hook

    handles = []
    for attention, layer in zip(layers, found, strict=True):
        handles.append(attention.k_proj.register_forward_hook(catch(layer, "key")))
        handles.append(attention.v_proj.register_forward_hook(catch(layer, "value")))
    try:
        yield found
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(model: PreTrainedModel, by: Sequence[Projected]) -> Iterator[None]:
    """Let the layers go on with other keys and values than those that they project themselves.

    The model's own key norm, rotation and attention follow, whatever the family.
    """

    def put(value: Tensor | None) -> Any:
        return lambda module, inputs, output: value

    handles = []
    for attention, layer in zip(attentions(model), by, strict=True):
        handles.append(attention.k_proj.register_forward_hook(put(layer.key)))
        handles.append(attention.v_proj.register_forward_hook(put(layer.value)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- from projections to cache entries ------------------------------------------------------------------


def normed(attention: Any, key: Tensor) -> Tensor:
    """Keys after the family's key norm, if it has one; same shape (batch, length, width)."""
    norm = getattr(attention, "k_norm", None)
    if norm is None:
        return key
    if norm.weight.shape[-1] == key.shape[-1]:  # one norm over all heads
        return norm(key)
    return norm(key.unflatten(-1, (-1, attention.head_dim))).flatten(-2)


def entries(
    model: PreTrainedModel, projected: Sequence[Projected], positions: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values as the cache holds them: (batch, kv_heads, length, head_dim), layer by layer.

    Args:
        positions: (batch or 1, length) positions by which the keys are rotated, none below zero.
    """
    layers = attentions(model)
    angles = _Angles(model, positions)
    rotate: Any = getattr(sys.modules[type(layers[0]).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise SubjectError(_refusal(model))
    made = []
    for index, (attention, layer) in enumerate(zip(layers, projected, strict=True)):
        assert layer.key is not None and layer.value is not None
        dim = attention.head_dim
        key = normed(attention, layer.key).unflatten(-1, (-1, dim)).transpose(1, 2)
        cos, sin = angles.of(index, key)
        key = rotate(key[:, :0], key, cos, sin)[1]  # the function wants queries too: none
        made.append((key, layer.value.unflatten(-1, (-1, dim)).transpose(1, 2)))
    return made


class _Angles:
    """Rotary angles of a decoder, computed once per kind of layer."""

    def __init__(self, model: PreTrainedModel, positions: Tensor) -> None:
        self.positions = positions
        self.rotary: Any = getattr(model.get_decoder(), "rotary_emb", None)
        if self.rotary is None:
            raise SubjectError(_refusal(model))
        # Families that mix global and sliding layers rotate both at different rates.
        by_kind = "layer_type" in inspect.signature(self.rotary.forward).parameters
        config = model.config.get_text_config(decoder=True)
        self.kinds = config.layer_types if by_kind else [None] * config.num_hidden_layers
        self._known: dict[str | None, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (batch or 1, length, dim) for one layer, in the dtype of `like`."""
        kind = self.kinds[layer]
        if kind not in self._known:
            arguments = () if kind is None else (kind,)
            self._known[kind] = self.rotary(like, self.positions, *arguments)
        return self._known[kind]


@torch.no_grad()
def check(model: PreTrainedModel) -> None:
    """Prove on a few tokens that `entries` makes what the model itself puts into its cache.

    Raises:
        SubjectError: where the family projects, norms or rotates in some other way.
    """
    runner = EagerRunner(model)
    tokens = torch.arange(5, device=model.device)[None] % int(runner.config.vocab_size)
    positions = torch.arange(5, device=model.device)[None]
    cache = runner.new_cache(1, 5)
    with caught(model) as found:
        runner.forward(Block(tokens, positions), cache)
    try:
        made = entries(model, found, positions)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise SubjectError(_refusal(model)) from error
    for (key, value), layer in zip(made, cache.layers, strict=True):
        if not (_same(key, layer.keys) and _same(value, layer.values)):
            raise SubjectError(_refusal(model))


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and torch.allclose(
        ours.float(), theirs.float(), rtol=1e-2, atol=1e-3
    )
