"""The measures of picture quality on a trained model: each tells a good sampler from bad ones.

`scenes-unet` draws held-out captions from the same noises in 50 steps, in 5, with the noise schedule
of another model, and with nothing read of the text. Measures that compare pictures pair by pair have
75 steps as their original, so that 50 steps are not held to themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hasten.measure.image_quality import psnr, ssim
from hasten.zoo.scenes.caption import prompts
from hasten.zoo.scenes.judge import features, frechet, load_judge, perceptual
from hasten.zoo.scenes.reader import attributes
from hasten.zoo.scenes.render import render
from tests.techniques import drawn

pytestmark = [pytest.mark.zoo, pytest.mark.thorough]

NAME, COUNT, PAIRS, ORIGINAL = "scenes-unet", 32, 6, "75"
MANY = (
    384  # a set's distance to real scenes falls much less from 5 steps to 50 than from broken ones
)


@contextmanager
def other_schedule(pipe: Any) -> Iterator[None]:
    """Sample as if the model had learnt another schedule of noise."""
    plain = pipe.scheduler
    assert plain.config.beta_schedule != "squaredcos_cap_v2"
    pipe.scheduler = type(plain).from_config(plain.config, beta_schedule="squaredcos_cap_v2")
    try:
        yield
    finally:
        pipe.scheduler = plain


@contextmanager
def zeroed_text(pipe: Any) -> Iterator[None]:
    """Let the network read zeros in the place of the text."""

    def zero(module: Any, args: Any, kwargs: Any) -> Any:
        states = kwargs["encoder_hidden_states"]
        return args, {**kwargs, "encoder_hidden_states": torch.zeros_like(states)}

    handle = pipe.unet.register_forward_pre_hook(zero, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


BREAKING: dict[str, Callable[[Any], Any]] = {"schedule": other_schedule, "text": zeroed_text}


@cache
def pictures(how: str, count: int = COUNT) -> drawn.Drawn:
    """Pictures by a number of steps, or by 50 steps that are broken in a named way."""
    steps = int(how) if how.isdigit() else 50
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 4.0}
    if how.isdigit():
        return drawn.draw(NAME, "", PAIRS if how == ORIGINAL else count, batch=32, **settings)
    if how == "text":  # both branches read the same, so one of them is enough
        settings["guidance_scale"] = 1.0
    with BREAKING[how](drawn.model(NAME)):
        return drawn.draw(NAME, "", count, batch=32, **settings)


# Each gives the quality of each picture, higher is better.
def _psnr(how: str) -> Tensor:
    return torch.from_numpy(psnr(pictures(how).array[:PAIRS], pictures(ORIGINAL).array))


def _ssim(how: str) -> Tensor:
    return torch.from_numpy(ssim(pictures(how).array[:PAIRS], pictures(ORIGINAL).array))


def _perceptual(how: str) -> Tensor:
    ours = pictures(how).pictures[:PAIRS]
    return -perceptual(load_judge(), ours, pictures(ORIGINAL).pictures).double()


def _attributes(how: str) -> Tensor:
    wanted = [scene for _, scene in prompts(COUNT, drawn.SEED)]
    return torch.tensor([found.share for found in attributes(pictures(how).pictures, wanted)])


MEASURES = {"psnr": _psnr, "ssim": _ssim, "perceptual": _perceptual, "attributes": _attributes}


@pytest.mark.parametrize("bad", ["5", *BREAKING])
@pytest.mark.parametrize("measure", MEASURES)
def test_50_steps_are_better_by_more_than_the_noise(measure: str, bad: str) -> None:
    good, worse = (MEASURES[measure](how).double() for how in ("50", bad))
    gain = good - worse
    error = float(gain.std()) / len(gain) ** 0.5
    assert float(gain.mean()) > 2 * error, (float(gain.mean()), error)


def share_of_wins(bad: str, count: int = COUNT) -> float:
    """Share of resamplings of the pictures in which those of 50 steps are nearer to real scenes."""
    judge = load_judge()
    sets = [features(judge, pictures(how, count).pictures) for how in ("50", bad)]
    real = features(judge, render([scene for _, scene in prompts(1024, 10_000)], 64))
    chance, wins = np.random.default_rng(0), 0
    for _ in range(200):
        rows = torch.from_numpy(chance.integers(0, count, count))
        near, far = (frechet(one[rows], real) for one in sets)
        wins += near < far
    return wins / 200


@pytest.mark.parametrize(("bad", "count"), [*((bad, COUNT) for bad in BREAKING), ("5", MANY)])
def test_50_steps_are_nearer_to_real_scenes(bad: str, count: int) -> None:
    assert share_of_wins(bad, count) > 0.9
