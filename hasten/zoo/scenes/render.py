"""From scenes to pictures: vectorised over the batch, with smooth edges, at any size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.errors import HastenError
from hasten.zoo.scenes.scene import COLOURS, SHAPES, Object, Scene

STROKE = 0.3  # thickness of a hollow shape's outline, in radii

# Proportions that give the four shapes about the same area at the same radius.
_SQUARE = 0.87  # half a side
_TRIANGLE = 1.3  # centre to corner
_DIAMOND = 1.2  # centre to corner

_CHUNK = 32  # pictures at a time, so that the planes of a chunk stay in the processor's cache


def render(scenes: Sequence[Scene], size: int = 64) -> Tensor:
    """Pictures (scenes, 3, size, size), red, green and blue from 0 to 1.

    Raises:
        HastenError: where the size is below 8 pixels.
    """
    _check(size)
    parts = [_render(scenes[i : i + _CHUNK], size) for i in range(0, len(scenes), _CHUNK)]
    return torch.cat(parts) if parts else torch.empty(0, 3, size, size)


def render_clips(scenes: Sequence[Scene], frames: int, size: int = 32) -> Tensor:
    """Clips (scenes, frames, 3, size, size) of scenes whose objects move."""
    stills = [scene.at(frame) for scene in scenes for frame in range(frames)]
    return render(stills, size).unflatten(0, (len(scenes), frames))


def masks(scene: Scene, size: int = 64) -> Tensor:
    """Where each object of a scene is: (objects, size, size) bool, a hollow one's outline only."""
    _check(size)
    return coverage(scene.objects, size) > 0.5


def coverage(objects: Sequence[Object], size: int) -> Tensor:
    """The share of each pixel that each object covers: (objects, size, size), from 0 to 1."""
    return cover(
        torch.tensor([SHAPES.index(thing.shape) for thing in objects]),
        torch.tensor([thing.fill == "hollow" for thing in objects]),
        torch.tensor([[thing.x, thing.y, thing.radius] for thing in objects]),
        size,
    )


def cover(shape: Tensor, hollow: Tensor, place: Tensor, size: int) -> Tensor:
    """As `coverage`, of objects as numbers.

    Args:
        shape: (objects,) places in SHAPES.
        hollow: (objects,) bool.
        place: (objects, 3) x, y and radius.
    """
    centres = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x = centres[None, None, :] - place[:, 0, None, None]
    y = centres[None, :, None] - place[:, 1, None, None]
    radius = place[:, 2, None, None]
    distance = torch.empty(len(shape), size, size)  # to the edge; negative inside
    for index, name in enumerate(SHAPES):
        chosen = (shape == index).nonzero()[:, 0]
        if len(chosen):
            distance[chosen] = _distance(name, x[chosen], y[chosen], radius[chosen])
    covered = (0.5 - distance * size).clamp_(0, 1)
    chosen = hollow.nonzero()[:, 0]
    if len(chosen):
        inner = distance[chosen] + STROKE * radius[chosen]
        covered[chosen] -= (0.5 - inner * size).clamp_(0, 1)
    return covered


def _distance(name: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    if name == "circle":
        return (x * x + y * y).sqrt_() - radius
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - _SQUARE * radius
    if name == "diamond":
        return (x.abs() + y.abs() - _DIAMOND * radius) * 0.5**0.5
    if name == "triangle":
        sides = 0.75**0.5 * x.abs() - 0.5 * y
        return torch.maximum(sides, y) - 0.5 * _TRIANGLE * radius
    raise AssertionError(name)


def area(shape: str, fill: str, radius: float = 1.0) -> float:
    """The area that an object covers, in squares of a picture width."""
    # A smaller copy of the shape is cut out of a hollow one; `inner` is its radius.
    inradius = {"circle": 1.0, "square": _SQUARE, "triangle": _TRIANGLE / 2}
    whole = {
        "circle": torch.pi,
        "square": 4 * _SQUARE**2,
        "triangle": 0.75 * 3**0.5 * _TRIANGLE**2,
        "diamond": 2 * _DIAMOND**2,
    }[shape]
    inner = 1 - STROKE / inradius.get(shape, _DIAMOND * 0.5**0.5)
    return whole * radius**2 * (1 - inner**2 if fill == "hollow" else 1)


def _render(scenes: Sequence[Scene], size: int) -> Tensor:
    pictures = _grounds(scenes, size)
    objects = [thing for scene in scenes for thing in scene.objects]
    owner = torch.tensor([i for i, scene in enumerate(scenes) for _ in scene.objects])
    if not objects:
        return pictures
    covered = coverage(objects, size)
    colours = torch.tensor([COLOURS[thing.colour] for thing in objects])
    # One layer at a time: the first object of every scene, then the second, and so on.
    layer = torch.tensor([i for scene in scenes for i in range(len(scene.objects))])
    for index in range(int(layer.max()) + 1):
        chosen = (layer == index).nonzero()[:, 0]
        below = pictures[owner[chosen]]
        paint = colours[chosen][:, :, None, None]
        pictures[owner[chosen]] = torch.lerp(below, paint, covered[chosen][:, None])
    return pictures


def _grounds(scenes: Sequence[Scene], size: int) -> Tensor:
    grounds = [scene.ground for scene in scenes]
    level = torch.tensor([ground.level for ground in grounds])
    shade = torch.tensor([ground.shade for ground in grounds])
    angle = torch.tensor([ground.angle for ground in grounds])
    axis = (torch.arange(size, dtype=torch.float32) + 0.5) / size - 0.5
    x, y = axis[None, None, :], axis[None, :, None]
    rise = angle.cos()[:, None, None] * x + angle.sin()[:, None, None] * y
    grey = level[:, None, None] + shade[:, None, None] * rise
    return grey[:, None].repeat(1, 3, 1, 1)


def _check(size: int) -> None:
    if size < 8:
        raise HastenError(f"size is {size} pixels; give 8 or more")
