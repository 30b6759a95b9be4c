"""Paths between noise and data, and walking one of them with the network of another.

A path is x = alpha * clean + sigma * noise at times s from 1 (noise) to 0 (data). Two paths with the
same ratio of alpha and sigma differ by a scale only, so the network of a flow (alpha = 1 - t,
sigma = t) serves any of them. Formulas after "Inference-Time Scaling for Flow Models via Stochastic
Generation and Rollover Budget Forcing" (arXiv 2503.19385).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

BETA_MIN, BETA_MAX = 0.1, 20.0  # of the variance-preserving path


@dataclass(frozen=True)
class Place:
    """A time of a path, beside the time of the flow that has its ratio of signal to noise.

    Attributes:
        s: the time of the path.
        alpha, sigma, d_alpha, d_sigma: of the path, and their derivatives by s.
        t, d_t: the flow's time, and its derivative by s.
        c, d_c: x of the path is c times x of the flow; and its derivative by s.
    """

    s: float
    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float
    t: float
    d_t: float
    c: float
    d_c: float

    def velocity(self, x: Tensor, flow: Tensor) -> Tensor:
        """dx/ds of the path, of its sample and the flow's velocity at x / c."""
        return (self.d_c / self.c) * x + self.c * self.d_t * flow

    def score(self, x: Tensor, velocity: Tensor) -> Tensor:
        """Gradient of the log density, of the path's own velocity."""
        q = self.alpha / self.d_alpha
        return (q * velocity - x) / (self.sigma**2 - q * self.d_sigma * self.sigma)

    def clean(self, x: Tensor, velocity: Tensor) -> Tensor:
        """The clean sample that the path's velocity speaks of."""
        down = self.d_alpha * self.sigma - self.d_sigma * self.alpha
        return (self.sigma * velocity - self.d_sigma * x) / down

    def step(
        self, x: Tensor, flow: Tensor, length: float, diffusion: float, noise: Tensor | None
    ) -> Tensor:
        """The sample `length` nearer to the data.

        Args:
            flow: the flow's velocity at x / c.
            diffusion: strength g of the noise; at 0 this is a step of the ODE.
            noise: Gaussian noise of x's shape; None for the ODE.
        """
        velocity = self.velocity(x, flow)
        moved = x - velocity * length
        if noise is None or diffusion == 0.0:
            return moved
        drift = 0.5 * diffusion**2 * self.score(x, velocity)
        return moved + drift * length + diffusion * math.sqrt(length) * noise


def linear(s: float) -> Place:
    """A time of the flow's own path."""
    return Place(s, 1.0 - s, s, -1.0, 1.0, s, 1.0, 1.0, 0.0)


def variance_preserving(s: float) -> Place:
    """A time, above 0, of the path along which alpha ** 2 + sigma ** 2 = 1."""
    integral = 0.5 * s * s * (BETA_MAX - BETA_MIN) + s * BETA_MIN
    rate = s * (BETA_MAX - BETA_MIN) + BETA_MIN
    alpha = math.exp(-0.5 * integral)
    sigma = math.sqrt(-math.expm1(-integral))
    d_alpha = -0.5 * rate * alpha
    d_sigma = 0.5 * rate * alpha * alpha / sigma
    t = sigma / (alpha + sigma)
    # With alpha = 1 - t and sigma = t, sigma * d_alpha - alpha * d_sigma of the flow is -1.
    d_t = -t * t * (sigma * d_alpha - alpha * d_sigma) / sigma**2
    c = sigma / t
    d_c = (d_sigma * t - sigma * d_t) / (t * t)
    return Place(s, alpha, sigma, d_alpha, d_sigma, t, d_t, c, d_c)


PATHS = {"linear": linear, "vp": variance_preserving}
