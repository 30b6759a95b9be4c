"""As `test_rivals`, for the techniques of the denoise engine: each beats the rival that its card names.

Captions that no recipe trains on are drawn by `scenes-dit` from the same noises with the technique,
with its rival and without either. To beat means: by more than two standard errors of the paired
difference, or, for a distance between sets, in all but few resamplings of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hasten
from hasten import technique as registry
from hasten.measure.image_quality import psnr
from hasten.plan import Plan
from hasten.technique import Parts
from hasten.zoo.scenes.caption import prompts
from hasten.zoo.scenes.judge import features, frechet, load_judge
from hasten.zoo.scenes.reader import attributes
from hasten.zoo.scenes.render import render
from tests.techniques import drawn

STEPS, PICTURES = 50, 12
FEW_STEPS, MANY_PICTURES = 10, 96  # for distances between sets
USUAL: dict[str, Any] = {"guidance_scale": 4.0}
SLUGS = [slug for slug in registry.names(engine="denoise") if registry.get(slug).card.rival]

# Knobs where the defaults ask for more than a test can spend, or for more than 256 tokens.
KNOBS: dict[str, dict[str, Any]] = {
    "adaspa": {"block": 16},  # of four blocks of 64 a query would read its own and no other
    "rollover_budget_forcing": {"budget": 60},
    "auto_diffusion": {"steps": 6, "population": 8, "samples": 64},
}

# Techniques that do not beat their rival on this model, and why; they must not lose to it either.
UNDECIDED: dict[str, str] = {}

pytestmark = [pytest.mark.zoo, pytest.mark.thorough]


@cache
def parts(plan: str) -> dict[str, Parts]:
    """Trained parts of a plan that needs some."""
    if not any(technique.trained for technique in Plan.parse(plan)):
        return {}
    return hasten.prepare("scenes-dit", plan, arguments=USUAL, write=False)


@cache
def pictures(plan: str, count: int, steps: int) -> drawn.Drawn:
    settings = {**USUAL, "num_inference_steps": steps}
    return drawn.draw("scenes-dit", plan, count, parts=parts(plan), **settings)


def fidelity(plan: str) -> Tensor:
    """PSNR of each picture to the full run's, dB."""
    ours, original = pictures(plan, PICTURES, STEPS), pictures("", PICTURES, STEPS)
    return torch.from_numpy(psnr(ours.array, original.array))


def asked_for(plan: str) -> Tensor:
    """Share of what each caption asks for that is there."""
    ours = pictures(plan, PICTURES, STEPS)
    wanted = [scene for _, scene in prompts(PICTURES, drawn.SEED)]
    return torch.tensor([found.share for found in attributes(ours.pictures, wanted)])


PAIRED: dict[str, Callable[[str], Tensor]] = {"psnr": fidelity, "attributes": asked_for}


def standard_errors(ours: str, theirs: str, metric: str) -> float:
    """The mean paired gain, in its standard errors."""
    gain = (PAIRED[metric](ours) - PAIRED[metric](theirs)).double()
    error = float(gain.std()) / len(gain) ** 0.5
    assert error > 0, "the pictures are the same"
    return float(gain.mean()) / error


def share_of_wins(ours: str, theirs: str) -> float:
    """Share of resamplings of the pictures in which ours are nearer to real scenes."""
    judge = load_judge()
    sets = [
        features(judge, pictures(plan, MANY_PICTURES, FEW_STEPS).pictures)
        for plan in (ours, theirs)
    ]
    scenes = [scene for _, scene in prompts(1024, 10_000)]
    real = features(judge, render(scenes, 64))
    chance, wins = np.random.default_rng(0), 0
    for _ in range(200):
        rows = torch.from_numpy(chance.integers(0, MANY_PICTURES, MANY_PICTURES))
        near, far = (frechet(some[rows], real) for some in sets)
        wins += near < far
    return wins / 200


@pytest.mark.parametrize("slug", SLUGS)
def test_it_beats_its_rival_by_more_than_the_noise(slug: str) -> None:
    technique = registry.get(slug)(**KNOBS.get(slug, {}))
    rival = technique.card.rival
    assert rival is not None
    ours, theirs = str(Plan.parse(technique)), rival.plan.format(**technique.knobs)
    if rival.metric == "frechet":
        share = share_of_wins(ours, theirs)
        assert share > (0.05 if slug in UNDECIDED else 0.95), f"{share:.3f} of the resamplings"
    else:
        gain = standard_errors(ours, theirs, rival.metric)
        assert gain > (-2 if slug in UNDECIDED else 2), f"{gain:.1f} standard errors"
