"""Trains a technique's parts beside a frozen model: one short loop for whole-model forward passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hasten.preparation import Tick
from hasten.technique import Parts

BETAS = (0.9, 0.95)
WARM_UP = 0.05  # share of the steps in which the learning rate rises
FLOOR = 0.1  # share of the learning rate that is left at the end
CLIP = 1.0  # largest norm of a gradient


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep a model's weights out of the gradient, and its dropout off; both are put back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        model.train(training)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def fit(
    weights: Parts,
    batches: Iterable[Tensor],
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int,
    rate: float,
    decay: float = 0.0,
    tick: Tick,
) -> None:
    """Lower a loss over some weights, in place: AdamW, warm-up, cosine to a tenth, clipped gradients.

    Matrices multiply in bfloat16, which halves the time also on CPUs; the weights stay in float32.

    Args:
        weights: float32 leaves that require a gradient.
        batches: what `loss` is called with, `steps` of them.
        rate: highest learning rate.
        decay: weight decay of everything that has two dimensions.
    """
    flat = [tensor for tensor in weights.values() if tensor.dim() < 2]
    deep = [tensor for tensor in weights.values() if tensor.dim() >= 2]
    groups = [{"params": deep, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        with torch.enable_grad(), torch.autocast(batch.device.type, torch.bfloat16):
            value = loss(batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
        optimizer.step()
        schedule.step()
        tick(step + 1, steps, f"loss {float(value.detach()):.3f}")


def _share(step: int, steps: int) -> float:
    """Share of the learning rate at a step."""
    warm_up = max(1.0, steps * WARM_UP)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return min(1.0, (step + 1) / warm_up) * (FLOOR + (1 - FLOOR) * cosine)
