"""Filling a field of tokens in from some of them, and where it varies most.

After "Just-in-Time: Training-Free Spatial Acceleration for Diffusion Transformers" (arXiv 2603.10744).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 4096  # tokens whose distances are measured at once


def nearest(kept: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(tokens,) for each token of a grid the place in `kept` of the nearest kept one."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).float()
    anchors = places[kept]
    parts = [torch.cdist(part, anchors).argmin(dim=1) for part in places.split(CHUNK)]
    return torch.cat(parts)


def lift(tokens: Tensor, kept: Tensor, nearest: Tensor, share: float) -> Tensor:
    """Fill in a field that is known at some tokens: nearest neighbour, then a Gaussian blur.

    Args:
        tokens: (batch, frames, height, width, values).
        share: of the tokens that are known; the fewer, the wider the blur.

    Returns:
        The same shape; known tokens keep their values exactly.
    """
    flat = tokens.flatten(1, 3)
    filled = flat[:, kept.to(flat.device)][:, nearest.to(flat.device)]
    b, f, h, w, d = tokens.shape
    planes = filled.reshape(b, f, h, w, d).permute(0, 1, 4, 2, 3).reshape(-1, 1, h, w)
    width = min(max(0.4 / math.sqrt(share), 1.0), 10.0)
    reach = math.ceil(3 * width)
    offsets = torch.arange(-reach, reach + 1, device=tokens.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / width) ** 2)
    kernel = (kernel / kernel.sum()).to(planes.dtype)
    planes = F.pad(planes, (reach,) * 4, mode="replicate")
    planes = F.conv2d(F.conv2d(planes, kernel.reshape(1, 1, -1, 1)), kernel.reshape(1, 1, 1, -1))
    smooth = planes.reshape(b, f, d, h, w).permute(0, 1, 3, 4, 2).reshape(flat.shape)
    known = torch.zeros(flat.shape[1], dtype=torch.bool, device=flat.device)
    known[kept.to(flat.device)] = True
    return torch.where(known[None, :, None], flat, smooth).reshape(tokens.shape)


def importance(tokens: Tensor) -> Tensor:
    """(tokens,) variance of a field in windows of 3 x 3 tokens, mean over its values and the batch."""
    b, f, h, w, d = tokens.shape
    planes = tokens.permute(0, 1, 4, 2, 3).reshape(b * f, d, h, w)
    planes = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    mean = F.avg_pool2d(planes, 3, 1)
    spread = F.avg_pool2d(planes * planes, 3, 1) - mean * mean
    return spread.mean(dim=1).reshape(b, f, h, w).mean(dim=0).flatten()


def beta_quantiles(steps: int, a: float = 1.4, b: float = 0.425) -> list[float]:
    """`steps` falling noise levels from 1: quantiles of a Beta distribution at even shares."""
    # With w = (1 - x) ** b the density has no pole at x = 1.
    w = np.linspace(0.0, 1.0, 20_001)
    density = (1.0 - w ** (1.0 / b)) ** (a - 1.0)
    above = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    shares = np.arange(steps) / steps  # of the distribution above the level
    return [float(1.0 - np.interp(s, above / above[-1], w) ** (1.0 / b)) for s in shares]
