"""Giving a scheduler other timesteps than those it made, with the coefficients that belong to them.

Diffusers' schedulers take coefficients from one of three places: from a list of noise levels beside
the timesteps, which is written anew here; from the next entry of the list of timesteps; or, as DDIM
does, from a step of fixed length, number of training steps // number of steps. For the last kind the
engine gives each step a divisor that makes its own length (`Run.gaps`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hasten.denoise.call_settings import steps_left_out
from hasten.denoise.levels import is_flow
from hasten.errors import SubjectError

if TYPE_CHECKING:
    from hasten.denoise.run import Run

_FIXED_LENGTH = ("DDIMScheduler", "DDIMParallel", "CogVideoXDDIM", "CogVideoXDPM")
_OTHER_TIMES = ("EDM", "Cosine", "SCM", "Helios")  # what they call timesteps are no such thing
SMALL = 0.02  # an offset as small as this is rounding of the timesteps


class Divisor(int):
    """A number of steps by which the number of training steps divides to a given length."""

    length: int

    def __new__(cls, steps: int, length: int) -> Divisor:
        made = super().__new__(cls, steps)
        made.length = length
        return made

    def __rfloordiv__(self, other: Any) -> int:
        return self.length


def times(scheduler: Any) -> list[float]:
    """The timesteps in hand, from noise to data."""
    return [float(t) for t in scheduler.timesteps]


def training_steps(scheduler: Any) -> int:
    """How many timesteps the scheduler's table has."""
    return int(scheduler.config.num_train_timesteps)


def sigma_of(scheduler: Any, time: float) -> float:
    """The noise level that a scheduler with a list of levels writes for a timestep."""
    if is_flow(scheduler):
        share = min(max(time / training_steps(scheduler), 0.0), 1.0)
        return _sigmoid(_logit(share) + _offset(scheduler))
    products = scheduler.alphas_cumprod.double().cpu().numpy()
    ratio = ((1.0 - products) / products) ** 0.5
    return float(np.interp(time, np.arange(len(ratio)), ratio))


def time_of(scheduler: Any, sigma: float) -> float:
    """The timestep of a flow's noise level, from 0 (data) to 1 (noise)."""
    share = _sigmoid(_logit(min(max(sigma, 0.0), 1.0)) - _offset(scheduler))
    return share * training_steps(scheduler)


def _offset(scheduler: Any) -> float:
    """By how much the levels of a flow are shifted against its timesteps.

    Every shift in use moves the logit of a level by a constant; most schedulers move the timesteps
    with it, and some pipelines do not.
    """
    count = training_steps(scheduler)
    pairs = [
        (float(t) / count, float(s))
        for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False)
        if 0.02 < float(s) < 0.98 and 0.02 < float(t) / count < 0.98
    ]
    if not pairs:
        return 0.0
    time, sigma = min(pairs, key=lambda pair: abs(pair[1] - 0.5))
    offset = _logit(sigma) - _logit(time)
    return offset if abs(offset) > SMALL else 0.0


def set_grid(run: Run, wanted: Sequence[float], *, sigmas: Sequence[float] | None = None) -> None:
    """Give the scheduler of a call other timesteps.

    Args:
        wanted: timesteps in the scheduler's own scale; usually falling.
        sigmas: their noise levels, for a scheduler with a list of them; by default those that
            belong to the timesteps.

    Raises:
        SubjectError: for a scheduler whose coefficients cannot follow.
    """
    scheduler = run.scheduler
    if list(wanted) == times(scheduler) and sigmas is None:
        return  # not even a rounding is changed
    check_grid(scheduler)
    old = scheduler.timesteps
    values = torch.tensor(list(wanted), dtype=torch.float64)
    values = values if old.is_floating_point() else values.round()
    if _has_levels(scheduler):
        levels = sigmas if sigmas is not None else [sigma_of(scheduler, t) for t in wanted]
        last = scheduler.sigmas[-1:].double().cpu()
        written = torch.cat([torch.tensor(list(levels), dtype=torch.float64), last])
        scheduler.sigmas = written.to(scheduler.sigmas.device, scheduler.sigmas.dtype)
    elif hasattr(scheduler, "custom_timesteps"):
        scheduler.custom_timesteps = True
    else:
        following = [*values[1:].long().tolist(), -1]  # after the last one the table ends
        run.gaps = [int(a) - b for a, b in zip(values.tolist(), following, strict=True)]
    scheduler.timesteps = values.to(old.device, old.dtype)
    scheduler.num_inference_steps = len(values)
    if hasattr(scheduler, "_begin_index"):
        # Few pipelines that begin with a picture tell the scheduler where.
        first = steps_left_out(run.pipe, len(values), run.arguments)
        scheduler._begin_index, scheduler._step_index = first, None
    forget(scheduler)


def check_grid(scheduler: Any, who: str = "") -> None:
    """Raise a SubjectError, which names a technique, for a scheduler whose coefficients cannot follow other timesteps."""
    name = type(scheduler).__name__
    if torch.is_tensor(getattr(scheduler, "sigmas", None)):
        # New levels are written by the flow's own formula, or from the table of training.
        known = is_flow(scheduler) or hasattr(scheduler, "alphas_cumprod")
    else:
        known = hasattr(scheduler, "custom_timesteps") or name.startswith(_FIXED_LENGTH)
    other = name.startswith(_OTHER_TIMES) or "Inverse" in name  # from data to noise
    if not known or other or getattr(scheduler, "order", 1) != 1:
        raise SubjectError(
            f"{who}{': ' if who else ''}{name} cannot be given other timesteps; use DDIM, DDPM, Euler, DPM-Solver++ (multistep), "
            "UniPC or a flow-matching Euler scheduler."
        )


def forget(scheduler: Any) -> None:
    """Make a solver of several steps forget earlier outputs, as at the start of a call."""
    if hasattr(scheduler, "model_outputs"):
        scheduler.model_outputs = [None] * len(scheduler.model_outputs)
    if hasattr(scheduler, "timestep_list"):
        scheduler.timestep_list = [None] * len(scheduler.timestep_list)
    for name, value in (("lower_order_nums", 0), ("last_sample", None)):
        if hasattr(scheduler, name):
            setattr(scheduler, name, value)
    for name in ("derivatives", "ets"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [])


def _has_levels(scheduler: Any) -> bool:
    sigmas = getattr(scheduler, "sigmas", None)
    return (
        torch.is_tensor(sigmas)
        and len(sigmas) == len(scheduler.timesteps) + 1
        and getattr(scheduler, "num_inference_steps", None) is not None
    )


def _logit(share: float) -> float:
    if share <= 0.0 or share >= 1.0:
        return math.copysign(math.inf, share - 0.5)
    return math.log(share / (1.0 - share))


def _sigmoid(value: float) -> float:
    return 0.0 if value == -math.inf else 1.0 / (1.0 + math.exp(-value))
