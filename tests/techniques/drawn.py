"""Pictures of the trained scene models for tests: drawn by a plan, compared with the full sampler's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hasten
from hasten.measure.image_quality import psnr, ssim
from hasten.zoo import catalogue
from hasten.zoo.scenes.caption import prompts
from hasten.zoo.scenes.judge import features, frechet, load_judge
from hasten.zoo.scenes.reader import attributes
from hasten.zoo.scenes.render import render

SEED = 7


@cache
def model(name: str) -> Any:
    """A trained pipeline of the zoo; the test is skipped where its folder is missing."""
    from diffusers import DiffusionPipeline

    given = os.environ.get(f"HASTEN_TEST_{name.upper().replace('-', '_')}")
    if given is None and name not in catalogue.names():
        pytest.skip(f"the zoo holds no {name} here; `hasten train {name}` makes it")
    pipe = DiffusionPipeline.from_pretrained(given or catalogue.path(name), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass
class Drawn:
    """What a plan drew of held-out captions, from noises that are the same for every plan.

    Attributes:
        pictures: (count, 3, height, width) from 0 to 1.
        activity: counters, summed over the calls.
        each: the same of each call.
    """

    pictures: Tensor
    activity: dict[str, float]
    each: list[dict[str, float]]

    @property
    def array(self) -> Any:
        """(count, height, width, 3), as the measures want it."""
        return self.pictures.movedim(1, -1).double().numpy()

    def psnr(self, other: Drawn) -> float:
        """Mean over pictures, in dB."""
        return float(np.mean(psnr(self.array, other.array)))

    def ssim(self, other: Drawn) -> float:
        """Mean over pictures."""
        return float(np.mean(ssim(self.array, other.array)))

    def shares(self) -> Any:
        """(count,) the share of what its caption asks for that each picture shows."""
        wanted = [scene for _, scene in prompts(len(self.pictures), SEED)]
        return np.array([found.share for found in attributes(self.pictures, wanted)])

    def attributes(self) -> float:
        """Mean of `shares`."""
        return float(self.shares().mean())

    def frechet(self) -> float:
        """Distance to as many real scenes."""
        scenes = [scene for _, scene in prompts(len(self.pictures), 10_000)]
        judge = load_judge()
        real = features(judge, render(scenes, self.pictures.shape[-1]))
        return frechet(features(judge, self.pictures), real)


def draw(
    name: str, plan: str, count: int = 16, *, batch: int = 16, parts: Any = None, **arguments: Any
) -> Drawn:
    """Draw held-out captions by a plan; each picture has a noise of its own."""
    pictures, each = [], []
    captions = [words for words, _ in prompts(count, SEED)]
    with hasten.apply(model(name), plan, parts=parts) as fast:
        for first in range(0, count, batch):
            some = captions[first : first + batch]
            seeds = range(1000 + first, 1000 + first + len(some))
            made = fast(
                some,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                return_dict=False,
                **arguments,
            )[0]
            pictures.append(made.float())
            each.append(dict(fast.activity))
    total: dict[str, float] = {}
    for counters in each:
        for key, value in counters.items():
            total[key] = total.get(key, 0) + value
    return Drawn(torch.cat(pictures), total, each)
