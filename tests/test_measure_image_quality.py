"""Measures of pictures: known values, and that they tell good from bad."""

from __future__ import annotations

import numpy as np
import pytest

from hasten.measure.image_quality import MOST_DB, differing, psnr, ssim


@pytest.fixture
def pictures() -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.random((6, 8, 8, 3))
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def test_psnr_of_a_known_error(pictures: np.ndarray) -> None:
    assert psnr(pictures + 0.1, pictures) == pytest.approx(np.full(6, 20.0))
    assert (psnr(pictures, pictures) == MOST_DB).all()


def test_identical_pictures_stand_beside_the_others(pictures: np.ndarray) -> None:
    decibels = psnr(np.concatenate([pictures, pictures + 0.1]), np.concatenate([pictures] * 2))
    assert differing(decibels) == pytest.approx(np.full(6, 20.0))
    assert differing(decibels[6:]) == pytest.approx(decibels[6:])
    assert (differing(decibels[:6]) == MOST_DB).all()  # there are no others


def test_ssim_against_the_formula(pictures: np.ndarray) -> None:
    assert ssim(pictures, pictures) == pytest.approx(np.ones(6))
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 1, 7, 7, 1))  # one window, so the formula can be written down
    x, y = a.ravel(), b.ravel()
    c1, c2 = 0.01**2, 0.03**2
    covariance = np.cov(x, y)
    wanted = (2 * x.mean() * y.mean() + c1) * (2 * covariance[0, 1] + c2)
    wanted /= (x.mean() ** 2 + y.mean() ** 2 + c1) * (covariance[0, 0] + covariance[1, 1] + c2)
    assert ssim(a, b) == pytest.approx([wanted])


def test_more_noise_is_worse(pictures: np.ndarray) -> None:
    noise = np.random.default_rng(2).normal(size=pictures.shape)
    for measure in (psnr, ssim):
        scores = [measure(pictures + share * noise, pictures).mean() for share in (0.02, 0.1, 0.3)]
        assert scores == sorted(scores, reverse=True)


def test_clips_are_judged_frame_by_frame(pictures: np.ndarray) -> None:
    clips = pictures.reshape(2, 3, *pictures.shape[1:])
    worse = clips + 0.1 * np.random.default_rng(3).normal(size=clips.shape)
    assert ssim(worse, clips) == pytest.approx(
        ssim(worse.reshape(pictures.shape), pictures).reshape(2, 3).mean(axis=1)
    )
    assert psnr(worse, clips).shape == (2,)
