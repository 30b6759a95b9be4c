"""As `test_rivals`, for the techniques of the denoise engine: each beats the rival that its card names.

Captions that no recipe trains on are drawn by a model of the zoo from the same noises with the
technique, with its rival and without either. To beat means: by more than two standard errors of the paired
difference, or, for a distance between sets, in all but few resamplings of the pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from hasten.zoo.scenes.render import render
from tests.techniques import drawn


@dataclass(frozen=True)
class Setting:
    """What is drawn: by which model, how many pictures, and how."""

    model: str = "scenes-dit"
    pictures: int = 12
    steps: int = 50
    guidance: float = 4.0

    @property
    def arguments(self) -> dict[str, Any]:
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance}


MANY = Setting(pictures=96, steps=10)  # for distances between sets
SETTINGS = {
    "rollover_budget_forcing": Setting(pictures=24),
    # Its residual noise stands for what a model of noise predicts, and its guidance is a mild one.
    "stream_diffusion": Setting("scenes-unet", pictures=144, steps=20, guidance=1.5),
}
SLUGS = [slug for slug in registry.names(engine="denoise") if registry.get(slug).card.rival]

# Knobs where the defaults ask for more than a test can spend, or for more than 256 tokens.
KNOBS: dict[str, dict[str, Any]] = {
    "adaspa": {"block": 16},  # of four blocks of 64 a query would read its own and no other
    "grat": {"cell": 4},  # and of four cells of 8 three, whichever
    "rollover_budget_forcing": {"budget": 100, "reward": "caption"},
    "auto_diffusion": {"steps": 6, "population": 8, "samples": 64},
}

# Techniques that do not beat their rival on this model, and why; they must not lose to it either.
UNDECIDED: dict[str, str] = {
    "just_in_time": "what its landing takes away in speckles it adds in blur",
}
# Techniques that lose to it, and why; the test tells when that is no longer so.
LOST: dict[str, str] = {
    "rollover_budget_forcing": "with two children a step the flow's own, smoother path is the better one",
}

pytestmark = [pytest.mark.zoo, pytest.mark.thorough]


@cache
def parts(plan: str, setting: Setting) -> dict[str, Parts]:
    """Trained parts of a plan that needs some."""
    if not any(technique.trained for technique in Plan.parse(plan)):
        return {}
    return hasten.prepare(setting.model, plan, arguments=setting.arguments, write=False)


@cache
def pictures(plan: str, setting: Setting) -> drawn.Drawn:
    made = parts(plan, setting)
    return drawn.draw(setting.model, plan, setting.pictures, parts=made, **setting.arguments)


def fidelity(plan: str, setting: Setting) -> Tensor:
    """PSNR of each picture to the full run's, dB."""
    return torch.from_numpy(psnr(pictures(plan, setting).array, pictures("", setting).array))


def asked_for(plan: str, setting: Setting) -> Tensor:
    """Share of what each caption asks for that is there."""
    return torch.from_numpy(pictures(plan, setting).shares())


PAIRED: dict[str, Callable[[str, Setting], Tensor]] = {"psnr": fidelity, "attributes": asked_for}


def standard_errors(ours: str, theirs: str, metric: str, setting: Setting) -> float:
    """The mean paired gain, in its standard errors."""
    gain = (PAIRED[metric](ours, setting) - PAIRED[metric](theirs, setting)).double()
    error = float(gain.std()) / len(gain) ** 0.5
    assert error > 0, "the pictures are the same"
    return float(gain.mean()) / error


def share_of_wins(ours: str, theirs: str, setting: Setting) -> float:
    """Share of resamplings of the pictures in which ours are nearer to real scenes."""
    judge = load_judge()
    sets = [features(judge, pictures(plan, setting).pictures) for plan in (ours, theirs)]
    scenes = [scene for _, scene in prompts(1024, 10_000)]
    real = features(judge, render(scenes, 64))
    chance, wins = np.random.default_rng(0), 0
    for _ in range(200):
        rows = torch.from_numpy(chance.integers(0, setting.pictures, setting.pictures))
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
        share = share_of_wins(ours, theirs, SETTINGS.get(slug, MANY))
        assert share > (0.05 if slug in UNDECIDED else 0.95), f"{share:.3f} of the resamplings"
    else:
        gain = standard_errors(ours, theirs, rival.metric, SETTINGS.get(slug, Setting()))
        if slug in LOST:
            assert gain < -2, f"{gain:.1f} standard errors: it no longer loses"
            return
        assert gain > (-2 if slug in UNDECIDED else 2), f"{gain:.1f} standard errors"
