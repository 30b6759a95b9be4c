"""Noise levels: what a network's output says of the clean sample, for every kind of scheduler.

A noisy sample is `x = alpha * clean + sigma * noise`. Diffusers' schedulers write levels in three
ways: as a table over training timesteps, as a ratio sigma / alpha at each step, or as the share of
noise of a flow. Some hand samples about as `clean + ratio * noise`; those are scaled back here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.errors import SubjectError

# These keep samples as clean + ratio * noise, and scale them only for the network.
_VARIANCE_EXPLODING = ("EulerDiscrete", "EulerAncestral", "Heun", "KDPM2", "LMSDiscrete")
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Level:
    """One noise level.

    Attributes:
        alpha, sigma: `x = alpha * clean + sigma * noise`, for x = `scale` * the scheduler's sample.
        kind: what the network predicts: "epsilon", "v_prediction", "sample" or "flow".
        scale: from the scheduler's sample to the network's input.
        sign: -1 for a flow that is told from noise to data.
    """

    alpha: float
    sigma: float
    kind: str
    scale: float = 1.0
    sign: float = 1.0

    def clean(self, output: Tensor, sample: Tensor) -> Tensor:
        """The clean sample that an output speaks of; both are of the sample's shape."""
        x = sample * self.scale
        if self.kind == "epsilon":
            return (x - self.sigma * output) / self.alpha
        if self.kind == "v_prediction":
            return self.alpha * x - self.sigma * output
        if self.kind == "flow":
            return x - self.sign * self.sigma * output
        return output

    def noise(self, output: Tensor, sample: Tensor) -> Tensor:
        """The noise that an output speaks of."""
        x = sample * self.scale
        if self.kind == "epsilon":
            return output
        if self.kind == "v_prediction":
            return self.alpha * output + self.sigma * x
        if self.kind == "flow":
            return x + self.sign * self.alpha * output
        return (x - self.alpha * output) / self.sigma

    def output_of_clean(self, clean: Tensor, sample: Tensor) -> Tensor:
        """The output that speaks of this clean sample."""
        x = sample * self.scale
        if self.kind == "epsilon":
            return (x - self.alpha * clean) / self.sigma
        if self.kind == "v_prediction":
            return (self.alpha * x - clean) / self.sigma
        if self.kind == "flow":
            return self.sign * (x - clean) / self.sigma
        return clean

    def output_of_noise(self, noise: Tensor, sample: Tensor) -> Tensor:
        """The output that speaks of this noise."""
        x = sample * self.scale
        if self.kind == "epsilon":
            return noise
        if self.kind == "v_prediction":
            return (noise - self.sigma * x) / self.alpha
        if self.kind == "flow":
            return self.sign * (noise - x) / self.alpha
        return (x - self.sigma * noise) / self.alpha


def is_flow(scheduler: Any) -> bool:
    """Whether samples are `(1 - sigma) * clean + sigma * noise`, with a velocity as output."""
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def level(scheduler: Any, step: int, timestep: Any) -> Level:
    """The noise level at which a step of a scheduler starts.

    Args:
        step: how many steps were made before it since `set_timesteps`.
        timestep: what the step is called with.

    Raises:
        SubjectError: for a scheduler whose levels are written in no way that is known here.
    """
    name, config = type(scheduler).__name__, scheduler.config
    kind = config.get("prediction_type", "epsilon")
    if is_flow(scheduler):
        sigma = float(scheduler.sigmas[step])
        if config.get("invert_sigmas"):
            return Level(sigma, 1.0 - sigma, "flow", sign=-1.0)
        is_velocity = "FlowMatch" in name or kind == "flow_prediction"
        return Level(1.0 - sigma, sigma, "flow" if is_velocity else kind)
    if kind not in _PREDICTIONS:
        raise SubjectError(f"{name} predicts {kind!r}; known are {', '.join(_PREDICTIONS)}.")
    if name.startswith(_VARIANCE_EXPLODING):
        ratios = scheduler.sigmas
        if step % 2 and hasattr(scheduler, "sigmas_interpol"):
            ratios = scheduler.sigmas_interpol  # every other step is made halfway
            step -= name.startswith("KDPM2Ancestral")  # whose list begins one earlier
        ratio = float(ratios[step])
        scale = (ratio * ratio + 1.0) ** -0.5
        return Level(scale, ratio * scale, kind, scale)
    known = not hasattr(scheduler, "precondition_outputs")  # as in EDM: scaled in a way of its own
    if known and hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(torch.as_tensor(scheduler.sigmas[step]))
        return Level(float(alpha), float(sigma), kind)
    if known and hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        share = float(scheduler.alphas_cumprod[int(timestep)])
        return Level(share**0.5, (1.0 - share) ** 0.5, kind)
    raise SubjectError(
        f"{name} does not say its noise levels in a way that is known here; use DDIM, DPM-Solver, UniPC, "
        "Euler or a flow-matching scheduler."
    )


def check_levels(scheduler: Any, who: str) -> None:
    """Raise a SubjectError, which names a technique, for a scheduler whose levels are not known here.

    It is asked before a call, of the list that a scheduler is made with.
    """
    last = int(scheduler.config.get("num_train_timesteps") or 1000) - 1
    try:
        level(scheduler, 0, last)
    except SubjectError as error:
        raise SubjectError(f"{who} goes by noise levels. {error}") from error
