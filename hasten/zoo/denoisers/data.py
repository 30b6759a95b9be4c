"""Endless training data: scenes drawn and rendered as they are needed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from hasten.zoo.scenes.caption import caption
from hasten.zoo.scenes.render import coverage, render, render_clips
from hasten.zoo.scenes.scene import COLOURS, FILLS, SHAPES, Scene, draw_many

PIXELS = 4  # the side of the square of pixels that one token stands for
NUM_LOOKS = len(COLOURS) * len(SHAPES) * len(FILLS)


@dataclass(frozen=True)
class Batch:
    """Pictures (rows, 3, size, size) or clips (rows, 3, frames, size, size) from -1 to 1.

    Attributes:
        scenes: what the pictures show; nothing of clips.
    """

    pictures: Tensor
    captions: tuple[str, ...]
    scenes: Sequence[Scene] = ()

    def to(self, device: torch.device | str) -> Self:
        return replace(self, pictures=self.pictures.to(device))


@dataclass(frozen=True)
class ScenePictures:
    """Square pictures with captions; the length of a row is its number of tokens."""

    seed: int = 0
    dropped: float = 0.1  # share of captions left empty, for guidance without a classifier
    halved: float = 0.0  # share of large batches with four times as many pictures of half the size
    halved_from: int = 0  # number of the first batch that can be one of them

    def layout(self, index: int, rows: int, length: int) -> tuple[int, int]:
        """How many pictures a batch holds, and the tokens of each: as asked for, unless halved."""
        halve = length >= 256 and index >= self.halved_from
        if halve and random.Random(index).random() < self.halved:
            return 4 * rows, length // 4
        return rows, length

    def batch(self, index: int, rows: int, length: int) -> Batch:
        rows, length = self.layout(index, rows, length)
        scenes = _scenes(self.seed, index, rows, length)
        size = PIXELS * math.isqrt(length)
        captions = _drop([caption(scene) for scene in scenes], self.dropped, index + self.seed)
        return Batch(2 * render(scenes, size) - 1, captions, scenes)


@dataclass(frozen=True)
class SceneClips:
    """Clips of moving shapes with captions; the length is that of all frames together.

    A length of one frame gives still pictures in the form of clips, which cost little and teach
    most of what there is to see.
    """

    seed: int = 0
    dropped: float = 0.1
    size: int = 32
    frames: int = 8

    def layout(self, index: int, rows: int, length: int) -> tuple[int, int]:
        """How many clips a batch holds, and the tokens of each: as asked for."""
        return rows, length

    def batch(self, index: int, rows: int, length: int) -> Batch:
        frames = length // (self.size // PIXELS) ** 2
        scenes = _scenes(self.seed, index, rows, length, frames=self.frames)
        # A single frame is one of the clip, so that both show the same world.
        chance = random.Random(index).random
        if frames < self.frames:
            scenes = [scene.at(int(chance() * (self.frames - frames + 1))) for scene in scenes]
        captions = _drop(
            [caption(scene, moving=True) for scene in scenes], self.dropped, index + self.seed
        )
        clips = render_clips(scenes, frames, self.size).transpose(1, 2)
        return Batch(2 * clips - 1, captions)


def looks_of(scenes: Sequence[Scene], cells: int) -> Tensor:
    """What stands in each cell of pictures (scenes, cells, cells): an object that covers a third of it.

    It is the number of the object's colour, shape and fill, 0 to NUM_LOOKS - 1, or NUM_LOOKS for the
    ground.
    """
    found = torch.full((len(scenes), cells, cells), NUM_LOOKS)
    objects = [thing for scene in scenes for thing in scene.objects]
    owners = [row for row, scene in enumerate(scenes) for _ in scene.objects]
    for thing, row, share in zip(objects, owners, coverage(objects, cells), strict=True):
        kinds = (list(COLOURS).index(thing.colour), SHAPES.index(thing.shape))
        look = (kinds[0] * len(SHAPES) + kinds[1]) * len(FILLS) + FILLS.index(thing.fill)
        found[row][share > 1 / 3] = look
    return found


def _scenes(seed: int, index: int, rows: int, length: int, *, frames: int = 1) -> list[Scene]:
    # Each length has scenes of its own, as its batches are counted from 0.
    return draw_many(rows, seed, start=(length << 20) + index * rows, frames=frames)


def _drop(captions: list[str], share: float, seed: int) -> tuple[str, ...]:
    chance = random.Random(~seed).random
    return tuple("" if chance() < share else text for text in captions)
