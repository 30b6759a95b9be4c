"""Placeholder tokens: a tuned copy of a model that knows one, and packed samples to tune it on.

The placeholder is a row of the input embedding behind the vocabulary, so that no text can hold it
and no logit stands for it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hasten.technique import Parts

PLACEHOLDER = "placeholder"  # name of the part that holds the placeholder's embedding
LEFT, RIGHT, FULL = ".left", ".right", ".full"


# -- weights -----------------------------------------------------------------------------------------


def matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of all linear layers but the LM head, by their name in the model."""
    inside = {id(module) for module in model.base_model.modules()}
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if id(module) in inside and isinstance(module, (nn.Linear, Conv1D))
    }


def fresh_parts(model: PreTrainedModel, rank: int, generator: torch.Generator) -> Parts:
    """Parts that change nothing yet: the placeholder is the mean embedding, every update is zero.

    Args:
        rank: of the updates; 0 holds each matrix in full.

    Returns:
        float32 tensors: "placeholder" (hidden,), and per matrix of shape (rows, columns) either
        ".left" (rows, rank) and ".right" (rank, columns), whose product is added, or ".full".
    """
    embedding = _embedding(model).weight.detach().float()
    parts = {PLACEHOLDER: embedding.mean(dim=0)}
    for name, weight in matrices(model).items():
        if rank == 0:
            parts[name + FULL] = weight.detach().float().clone()
            continue
        rows, columns = weight.shape
        thin = min(rank, rows, columns)
        noise = torch.randn(thin, columns, generator=generator) / columns**0.5
        parts[name + LEFT] = torch.zeros(rows, thin, device=weight.device)
        parts[name + RIGHT] = noise.to(weight.device)
    return parts


def merged(model: PreTrainedModel, parts: Parts) -> dict[str, Tensor]:
    """The tuned tensors by their name in the model, in its dtype; the embedding has one row more."""
    found = {}
    for name, weight in matrices(model).items():
        if name + FULL in parts:
            found[name] = parts[name + FULL].to(weight)
        elif name + LEFT in parts:
            update = (
                parts[name + LEFT].to(weight.device).float()
                @ parts[name + RIGHT].to(weight.device).float()
            )
            found[name] = (weight.float() + update).to(weight.dtype)
    embedding = _embedding(model).weight
    row = parts[PLACEHOLDER].to(embedding)
    found[embedding_name(model)] = torch.cat((embedding.detach(), row[None]))
    return found


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())


def embedding_name(model: PreTrainedModel) -> str:
    """Name of the input embedding's weight in the model."""
    embedding = _embedding(model)
    return next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)


def placeholder_id(model: PreTrainedModel) -> int:
    """The id behind the vocabulary of the untuned model."""
    return int(_embedding(model).weight.shape[0])


@torch.no_grad()
def tuned_copy(model: PreTrainedModel, parts: Parts) -> PreTrainedModel:
    """A second model with the tuned tensors; whatever was not tuned is the first one's, shared."""
    tuned = merged(model, parts)
    longer = nn.Parameter(tuned.pop(embedding_name(model)), requires_grad=False)
    named = dict(model.named_parameters())
    # deepcopy takes what its memo holds instead of copying it.
    memo: dict[int, object] = {id(t): t for t in (*named.values(), *model.buffers())}
    memo |= {
        id(named[name]): nn.Parameter(tensor, requires_grad=False) for name, tensor in tuned.items()
    }
    twin = copy.deepcopy(model, memo)
    embedding = _embedding(twin)
    embedding.weight = longer  # the LM head keeps the vocabulary's rows, also where both were one
    embedding.num_embeddings = longer.shape[0]
    return twin


# -- samples -----------------------------------------------------------------------------------------


@dataclass
class Packed:
    """Sequences, each followed by the placeholders of several cuts, as one block of the engine.

    The placeholders of a cut stand where the tokens behind it stood. They see the tokens up to the
    cut, the placeholders of the same cut before them, and nothing else.

    Attributes:
        tokens: (batch, length + cuts * depth).
        positions: (1, length + cuts * depth) true positions.
        tree: (block, block) bool, True where the row may see the column.
        targets: (cuts, depth) index of the token that each placeholder is to predict.
    """

    tokens: Tensor
    positions: Tensor
    tree: Tensor
    targets: Tensor


def pack(ids: Tensor, cuts: Sequence[int] | Tensor, depth: int, placeholder: int) -> Packed:
    """Pack sequences (batch, length) with cuts behind the given tokens, each with `depth` placeholders.

    A cut must leave depth + 1 tokens behind it: the first is the ordinary prediction's.
    """
    batch, length = ids.shape
    device = ids.device
    after = torch.as_tensor(cuts, device=device)
    assert int(after.max()) + depth + 1 < length, "a cut needs its targets inside the sequence"
    offsets = torch.arange(1, depth + 1, device=device)
    seats = after[:, None] + offsets  # (cuts, depth) positions
    count = seats.numel()
    real = torch.arange(length, device=device)
    cut = torch.cat((real, after.repeat_interleave(depth)))  # last token that a row may see
    own = torch.cat(
        (
            torch.zeros_like(real),
            torch.arange(len(after), device=device).repeat_interleave(depth) + 1,
        )
    )
    positions = torch.cat((real, seats.flatten()))
    is_real = own == 0
    sees_token = is_real[None, :] & (positions[None, :] <= cut[:, None])
    same_cut = (
        ~is_real[:, None]
        & (own[:, None] == own[None, :])
        & (positions[None, :] <= positions[:, None])
    )
    tokens = torch.cat((ids, ids.new_full((batch, count), placeholder)), dim=1)
    return Packed(tokens, positions[None], sees_token | same_cut, seats + 1)


def wanted(easy: Tensor, targets: Tensor) -> Tensor:
    """Which placeholders are trained, (batch, cuts, depth) bool: those of the unit, and the one that ends it.

    A unit is one token and the easy ones that follow it without a gap. The first token that is not
    easy is trained too: were all targets easy ones, the model would never learn to be unsure.

    Args:
        easy: (batch, length) bool, True where the model is confident of the token.
        targets: as `Packed.targets`.
    """
    inside = easy[:, targets].long()
    before = torch.cat((torch.ones_like(inside[..., :1]), inside[..., :-1]), dim=2)
    return before.cumprod(dim=2).bool()
