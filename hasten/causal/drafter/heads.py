"""Training of Medusa's heads on a frozen model, and how often each of their guesses is right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from hasten.causal.fitting import fit, frozen
from hasten.preparation import Preparation
from hasten.technique import Parts

NUM_RANKS = 10  # guesses of each head that a tree may use, as in the paper
LAMBDA = 0.8  # head k weighs LAMBDA ** k in the loss, as in the paper
RATE = 3e-3  # learning rate; the paper's 1e-3 is for wider models
STEPS = 1500
BATCH = 8
CROP = 256  # tokens of one training sequence
VALIDATION_SHARE = 0.05
VALIDATION_BATCHES = 16


def train_heads(
    preparation: Preparation, num_heads: int, *, num_layers: int = 1, tied: bool = False
) -> Parts:
    """Heads for a model that stays frozen, and their accuracy on text that they did not see.

    Returns:
        The parts of `untrained_heads` once trained, the large ones in bfloat16, and "accuracy"
        (heads, ranks) as `rank_accuracy` measures it.
    """
    model = preparation.subject.model
    parts = untrained_heads(model, num_heads, num_layers=num_layers, tied=tied)
    train, validation = _split(preparation)
    steps = preparation.steps or STEPS
    for tensor in parts.values():
        tensor.requires_grad_()
    with frozen(model):
        fit(
            parts,
            train.batches(length=CROP, batch=BATCH, steps=steps),
            lambda ids: medusa_loss(model, ids, parts),
            steps=steps,
            rate=RATE,
            tick=preparation.tick,
        )
        parts = {name: tensor.detach() for name, tensor in parts.items()}
        if not tied:
            parts["output"] = parts["output"].to(torch.bfloat16)
        crops = validation.batches(length=CROP, batch=BATCH, steps=VALIDATION_BATCHES)
        return parts | {"accuracy": rank_accuracy(model, crops, parts)}


def untrained_heads(
    model: PreTrainedModel, num_heads: int, *, num_layers: int = 1, tied: bool = False
) -> Parts:
    """Heads whose logits are those of the LM head, all in float32.

    Returns:
        "weight" (heads, layers, hidden, hidden) and "bias" (heads, layers, hidden), both zero, and
        "output" (heads, vocabulary, hidden), a copy of the LM head for each; none where `tied`.
    """
    output = model.get_output_embeddings().weight.detach()  # type: ignore[union-attr]
    size = output.shape[1]
    like: dict[str, Any] = {"device": model.device, "dtype": torch.float32}
    parts = {
        "weight": torch.zeros(num_heads, num_layers, size, size, **like),
        "bias": torch.zeros(num_heads, num_layers, size, **like),
    }
    return parts if tied else parts | {"output": output.to(**like).repeat(num_heads, 1, 1)}


def medusa_loss(model: PreTrainedModel, ids: Tensor, parts: Parts) -> Tensor:
    """Medusa-1: the sum over heads k = 1.. of LAMBDA^k * cross-entropy(head k at t, token t + k + 1).

    Args:
        ids: (batch, length).
    """
    hidden = last_states(model, ids)
    loss = hidden.new_zeros(())
    for index in range(parts["weight"].shape[0]):
        ahead = index + 2  # head k = index + 1 guesses token t + k + 1
        logits = head_logits(model, parts, index, hidden[:, :-ahead])
        entropy = F.cross_entropy(logits.flatten(0, 1), ids[:, ahead:].flatten())
        loss = loss + LAMBDA ** (index + 1) * entropy
    return loss


@torch.no_grad()
def rank_accuracy(
    model: PreTrainedModel,
    crops: Iterable[Tensor],
    parts: Parts,
    *,
    num_ranks: int = NUM_RANKS,
    shift: int = 0,
) -> Tensor:
    """How often each guess of each head is the token of the text: (heads, ranks).

    Args:
        crops: batches (batch, length) of ids.
        shift: compare with a token that much further on (0 is what the heads are trained for).
    """
    num_heads = parts["weight"].shape[0]
    hits, count = torch.zeros(num_heads, num_ranks), 0
    for ids in crops:
        hidden = last_states(model, ids)
        length = ids.shape[1] - num_heads - 1 - max(shift, 0)
        count += ids.shape[0] * length
        for index in range(num_heads):
            logits = head_logits(model, parts, index, hidden[:, :length])
            best = logits.topk(num_ranks, dim=-1).indices
            start = index + 2 + shift
            truth = ids[:, start : start + length, None]
            hits[index] += (best == truth).sum(dim=(0, 1)).cpu()
    return hits / count


def head_logits(model: PreTrainedModel, parts: Parts, index: int, hidden: Tensor) -> Tensor:
    """One head's logits (..., vocabulary) for last states (..., hidden), float32."""
    lm_head: Any = model.get_output_embeddings()
    states = head_states(hidden, parts["weight"][index], parts["bias"][index])
    if "output" not in parts:
        return lm_head(states.to(lm_head.weight.dtype)).float()
    return F.linear(states, parts["output"][index].to(states.dtype), lm_head.bias).float()


def head_states(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h + SiLU(W h + b), layer after layer; states and result (..., hidden).

    Args:
        weight: (layers, hidden, hidden).
        bias: (layers, hidden).
    """
    for w, b in zip(weight, bias, strict=True):
        states = states + F.silu(F.linear(states, w, b))
    return states


@torch.no_grad()
def last_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What enters the LM head for ids (batch, length): (batch, length, hidden), float32.

    The LM head itself is run for one position only, since nobody wants its logits.
    """
    caught: list[Tensor] = []

    def catch(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        caught.append(inputs[0])
        return (inputs[0][:, :1], *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(catch)  # type: ignore[union-attr]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return caught[0].float()


def _split(preparation: Preparation) -> tuple[Preparation, Preparation]:
    """Texts to train on and texts to measure on; a single text is cut in two."""
    texts = preparation.texts
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - VALIDATION_SHARE))
        texts = [texts[0][:cut], texts[0][cut:]]
    kept = max(1, round(len(texts) * VALIDATION_SHARE))
    return replace(preparation, texts=texts[:-kept]), replace(preparation, texts=texts[-kept:])
