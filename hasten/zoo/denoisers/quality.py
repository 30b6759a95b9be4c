"""How good a picture model is: what the reader and the judge say of its samples, and a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hasten.zoo.scenes.caption import HELD_OUT, prompts
from hasten.zoo.scenes.judge import Judge, features, frechet
from hasten.zoo.scenes.reader import compare, mean_attributes, read
from hasten.zoo.scenes.render import render, render_clips
from hasten.zoo.scenes.scene import Scene, draw_many

_LARGEST_GRID = 150_000  # bytes
_CHUNK = 32  # pictures that are made at once


def sample(
    pipeline: Any, texts: Sequence[str], sampling: Mapping[str, Any], *, seed: int = 0
) -> Tensor:
    """One picture (or clip) for each text, each from a seed of its own: number `seed` and on.

    Args:
        pipeline: of Diffusers.
        sampling: arguments of the pipeline's call, such as num_inference_steps.

    Returns:
        (texts, 3, height, width) or (texts, frames, 3, height, width), from 0 to 1.
    """
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for begin in range(0, len(texts), _CHUNK):
        part = list(texts[begin : begin + _CHUNK])
        generators = [torch.Generator().manual_seed(seed + begin + i) for i in range(len(part))]
        result = pipeline(prompt=part, generator=generators, output_type="pt", **sampling)
        images = result.images if hasattr(result, "images") else result.frames
        made.append(torch.as_tensor(images).float())
    return torch.cat(made)


def sample_quality(
    pipeline: Any,
    sampling: Mapping[str, Any],
    *,
    num: int,
    frames: int = 1,
    judge: Judge | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Attributes that the reader finds, and with a judge the Frechet distance to real scenes.

    Of clips the first, middle and last frame are read, and `motion` is the share of objects that
    are found in the first and last one and move as they should.
    """
    texts, scenes = map(list, zip(*prompts(num, seed, frames=frames), strict=True))
    pictures = sample(pipeline, texts, sampling, seed=seed)
    if frames == 1:
        shown = pictures
        found = mean_attributes(
            [compare(one, two) for one, two in zip(read(shown), scenes, strict=True)]
        )
    else:
        found, shown = _clip_quality(pictures, scenes)
    if judge is not None:
        real = real_features(judge, len(shown), shown.shape[-1], frames=frames)
        again = real_features(judge, len(shown), shown.shape[-1], frames=frames, run=1)
        found["frechet"] = frechet(features(judge, shown), real)
        found["frechet_of_real"] = frechet(again, real)
    return found


def real_features(judge: Judge, num: int, size: int, *, frames: int = 1, run: int = 0) -> Tensor:
    """Features of held-out scenes that are in no benchmark's prompts."""
    scenes = draw_many(num, 2 * HELD_OUT + run, frames=frames)
    if frames > 1:  # any frame will do
        scenes = [scene.at(i % frames) for i, scene in enumerate(scenes)]
    return features(judge, render(scenes, size))


def _clip_quality(clips: Tensor, scenes: list[Scene]) -> tuple[dict[str, float], Tensor]:
    frames = clips.shape[1]
    chosen = [0, frames // 2, frames - 1]
    results, motion = [], []
    seen = {frame: read(clips[:, frame]) for frame in chosen}
    for frame in chosen:
        # Captions of clips do not say how objects stand to each other.
        results += [
            compare(one, two, relation=False) for one, two in zip(seen[frame], scenes, strict=True)
        ]
    for first, last, scene in zip(seen[0], seen[frames - 1], scenes, strict=True):
        motion += _motions(first, last, scene, frames - 1)
    found = mean_attributes(results)
    found["motion"] = sum(motion) / len(motion)
    return found, clips[:, chosen].flatten(0, 1)


def _motions(first: Scene, last: Scene, wanted: Scene, frames: int) -> list[bool]:
    """For each wanted object, whether one of its looks moved in its direction."""
    hits = []
    for thing in wanted.objects:
        look = (thing.colour, thing.shape)
        before = [other for other in first.objects if (other.colour, other.shape) == look]
        after = [other for other in last.objects if (other.colour, other.shape) == look]
        moved = False
        for one in before:
            for two in after:
                dx, dy = (two.x - one.x) / frames, (two.y - one.y) / frames
                step = type(thing)(*look, thing.size, thing.fill, one.x, one.y, one.radius, dx, dy)
                moved = moved or step.motion == thing.motion
        hits.append(moved)
    return hits


def save_grid(pictures: Tensor, file: Path, *, columns: int = 8) -> None:
    """Write pictures (pictures, 3, size, size) or clips, one a row, as one PNG."""
    from PIL import Image

    if pictures.ndim == 5:
        columns = pictures.shape[1]
        pictures = pictures.flatten(0, 1)
    count, _, height, width = pictures.shape
    rows = -(-count // columns)
    sheet = torch.ones(3, rows * (height + 2), columns * (width + 2))
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + 2), i % columns * (width + 2)
        sheet[:, top : top + height, left : left + width] = picture.clamp(0, 1)
    image = Image.fromarray((255 * sheet.permute(1, 2, 0)).round().byte().numpy())
    image.save(file, optimize=True)
    if file.stat().st_size > _LARGEST_GRID:  # the noise of an untrained model takes many bytes
        image.quantize(64).save(file, optimize=True)


def real_pictures(scenes: Sequence[Scene], size: int, frames: int = 1) -> Tensor:
    """What perfect samples of those scenes could look like, in the form of `sample`."""
    return render(scenes, size) if frames == 1 else render_clips(scenes, frames, size)
