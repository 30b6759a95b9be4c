"""Judging pictures of the scenes that captions ask for; without a downloaded network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hasten.subject import Subject
from hasten.zoo import catalogue
from hasten.zoo.scenes.caption import prompts as held_out
from hasten.zoo.scenes.judge import Judge, features, frechet, load_judge, perceptual
from hasten.zoo.scenes.reader import attributes
from hasten.zoo.scenes.render import render, render_clips
from hasten.zoo.scenes.scene import Scene

REAL_SEED = 10_000  # of the real scenes that pictures are compared with

Array = NDArray[np.float64]


@dataclass
class SceneJudge:
    """Says what pictures of held-out captions show, and how they look beside real scenes.

    Attributes:
        captions: held-out captions with the scenes that they tell of.
        frames: pictures of a clip; 1 where pictures stand still.
    """

    network: Judge
    captions: list[tuple[str, Scene]]
    frames: int

    def prompts(self) -> list[str]:
        """The captions."""
        return [words for words, _ in self.captions]

    def perceptual(self, ours: Array, original: Array) -> Array:
        """(count,) distance of each picture to its original, as the network sees them."""
        found = perceptual(self.network, _planes(ours), _planes(original)).double()
        distances: Array = found.reshape(len(ours), -1).mean(dim=1).numpy()
        return distances

    def frechet(self, pictures: Array) -> float:
        """Distance of the set to as many real scenes; compare only values of one count."""
        planes = _planes(pictures)
        scenes = [scene for _, scene in held_out(len(pictures), REAL_SEED, frames=self.frames)]
        size = planes.shape[-1]
        real = render(scenes, size)
        if self.frames > 1:
            real = render_clips(scenes, self.frames, size).flatten(0, 1)
        return frechet(features(self.network, planes), features(self.network, real))

    def attributes(self, pictures: Array) -> list[float]:
        """For each picture the share of what its caption asks for; of a clip its first frame."""
        first = pictures if pictures.ndim == 4 else pictures[:, 0]
        wanted = [scene for _, scene in self.captions[: len(first)]]
        return [found.share for found in attributes(_planes(first), wanted)]


def scene_judge(subject: Subject, count: int, seed: int) -> SceneJudge | None:
    """The judge of a model of the zoo that makes scenes; None for any other."""
    if not catalogue.is_zoo_name(subject.name) or not subject.name.startswith("scenes-"):
        return None
    frames = int(catalogue.card(subject.name)["recipe"].get("frames", 1))
    return SceneJudge(load_judge(), held_out(count, seed, frames=frames), frames)


def _planes(pictures: Array | Sequence[Array]) -> Tensor:
    """(pictures, 3, height, width) float32."""
    stacked = torch.from_numpy(np.asarray(pictures)).float()
    return stacked.reshape(-1, *stacked.shape[-3:]).movedim(-1, 1)
