"""Training of Medusa's heads on a frozen model, and how often each of their guesses is right."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel

from hasten.prepare import Preparation
from hasten.technique import Parts

NUM_RANKS = 10  # guesses of each head that a tree may use, as in the paper
LAMBDA = 0.8  # head k weighs LAMBDA ** k in the loss, as in the paper
CROP = 256  # tokens of one training sequence
BATCH = 4
STEPS = 600
LEARNING_RATE = 1e-3
WARM_UP = 20  # steps
VALIDATION_SHARE = 0.05
VALIDATION_BATCHES = 16


def train_heads(preparation: Preparation, num_heads: int) -> Parts:
    """Heads for a model that stays frozen, and their accuracy on text that they did not see.

    Returns:
        "weight" (heads, hidden, hidden) and "bias" (heads, hidden), both zero before training, and
        "accuracy" (heads, ranks) as `rank_accuracy` measures it.
    """
    model = preparation.subject.model
    hidden_size = model.get_output_embeddings().weight.shape[1]  # type: ignore[union-attr]
    weight = torch.zeros(num_heads, hidden_size, hidden_size, device=model.device, requires_grad=True)
    bias = torch.zeros(num_heads, hidden_size, device=model.device, requires_grad=True)
    train, validation = _split(preparation)
    steps = preparation.steps or STEPS
    optimizer = torch.optim.AdamW([weight, bias], lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    for step, ids in enumerate(train.batches(length=CROP, batch=BATCH, steps=steps)):
        optimizer.zero_grad()
        loss = add_gradients(model, ids, weight, bias)
        optimizer.step()
        schedule.step()
        preparation.tick(step + 1, steps, f"loss {loss:.3f}")
    parts = {"weight": weight.detach(), "bias": bias.detach()}
    crops = validation.batches(length=CROP, batch=BATCH, steps=VALIDATION_BATCHES)
    return parts | {"accuracy": rank_accuracy(model, crops, parts)}


def add_gradients(model: PreTrainedModel, ids: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Add the gradient of the Medusa-1 loss of one batch (batch, length); return the loss.

    loss = sum over heads k = 1.. of LAMBDA^k * cross-entropy(head k at t, token t + k + 1). The
    heads do not depend on each other, so one is done after the other and only the logits of one
    are ever in memory.
    """
    hidden = last_states(model, ids)
    total = 0.0
    for index in range(weight.shape[0]):
        ahead = index + 2  # head k = index + 1 guesses token t + k + 1
        states = hidden[:, :-ahead].flatten(0, 1)
        logits = lm_logits(model, head_states(states, weight[index], bias[index]))
        loss = LAMBDA ** (index + 1) * F.cross_entropy(logits, ids[:, ahead:].flatten())
        loss.backward()
        total += float(loss)
    return total


@torch.no_grad()
def rank_accuracy(
    model: PreTrainedModel, crops: Iterable[Tensor], parts: Parts, *, num_ranks: int = NUM_RANKS, shift: int = 0
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
            states = head_states(hidden[:, :length], parts["weight"][index], parts["bias"][index])
            best = lm_logits(model, states).topk(num_ranks, dim=-1).indices
            start = index + 2 + shift
            truth = ids[:, start : start + length, None]
            hits[index] += (best == truth).sum(dim=(0, 1)).cpu()
    return hits / count


def head_states(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One head's states h + SiLU(W h + b), same shape as `hidden` (..., hidden)."""
    return hidden + F.silu(F.linear(hidden, weight, bias))


def lm_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The LM head's logits in float32; the gradient stops at its weights, which stay as they are."""
    head = model.get_output_embeddings()
    frozen = {name: tensor.detach().float() for name, tensor in head.named_parameters()}  # type: ignore[union-attr]
    return functional_call(head, frozen, (states,))  # type: ignore[arg-type]


@torch.no_grad()
def last_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What enters the LM head for ids (batch, length): (batch, length, hidden), float32.

    The head itself is run for one position only, since nobody wants its logits.
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


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a short warm-up, then a cosine down to zero."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _split(preparation: Preparation) -> tuple[Preparation, Preparation]:
    """Texts to train on and texts to measure on; a single text is cut in two."""
    texts = preparation.texts
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - VALIDATION_SHARE))
        texts = [texts[0][:cut], texts[0][cut:]]
    kept = max(1, round(len(texts) * VALIDATION_SHARE))
    return replace(preparation, texts=texts[:-kept]), replace(preparation, texts=texts[-kept:])
