"""Quality of pictures and clips beside those of the original: PSNR and SSIM.

Pictures are arrays (count, height, width, channels) with values from 0 to 1; clips have a frame axis
behind the first, and are judged frame by frame.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

WINDOW = 7  # pixels, of the squares over which SSIM compares
MOST_DB = 100.0  # stands for identical pictures, whose PSNR is infinite; see `differing`


def psnr(ours: Array, theirs: Array) -> Array:
    """(count,) peak signal-to-noise ratio in dB of each picture to its original; 100 at most."""
    error = ((ours - theirs) ** 2).reshape(len(ours), -1).mean(axis=1)
    floor = 10 ** (-MOST_DB / 10)
    found: Array = -10 * np.log10(np.maximum(error, floor))
    return found


def differing(decibels: Array) -> Array:
    """The PSNR of pictures that are not identical to their originals; all of them where every one is.

    A mean over both kinds would say little: the PSNR of identical pictures is infinite, so whatever
    stands for it, a few of them lift the mean by as much as one likes. So the mean is that of the
    others, as in the papers, whose pictures all differ; and how many are identical is said beside
    it.
    """
    others: Array = decibels[decibels < MOST_DB]
    return others if len(others) else decibels


def ssim(ours: Array, theirs: Array) -> Array:
    """(count,) structural similarity of each picture to its original, 1 for equal ones.

    Wang et al. 2004 with a square window of 7 pixels and the usual constants (0.01, 0.03), each
    channel on its own.
    """
    count = len(ours)
    first, second = (_frames(pictures) for pictures in (ours, theirs))
    mean_a, mean_b = _box(first), _box(second)
    # Over so few pixels the unbiased variance is a little larger.
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    variance_a = unbiased * (_box(first * first) - mean_a**2)
    variance_b = unbiased * (_box(second * second) - mean_b**2)
    covariance = unbiased * (_box(first * second) - mean_a * mean_b)
    c1, c2 = 0.01**2, 0.03**2
    found = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    )
    scores: Array = found.reshape(count, -1).mean(axis=1)
    return scores


def _frames(pictures: Array) -> Array:
    """(frames, height, width, channels) of pictures and of clips."""
    return pictures.reshape(-1, *pictures.shape[-3:]).astype(np.float64)


def _box(pictures: Array) -> Array:
    """Means over all whole windows of `WINDOW` pixels a side."""
    size = min(WINDOW, *pictures.shape[1:3])
    sums = np.pad(pictures.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0), (0, 0)))
    found: Array = (
        sums[:, size:, size:]
        - sums[:, :-size, size:]
        - sums[:, size:, :-size]
        + sums[:, :-size, :-size]
    ) / size**2
    return found
