"""What a scene is, and how one is drawn from a seed.

A scene holds one to three coloured shapes that do not touch, on a shaded grey ground. Lengths are
in picture widths, x runs right and y runs down, so a scene has no resolution of its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hasten.errors import HastenError

SHAPES = ("circle", "square", "triangle", "diamond")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.72, 0.18),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.70, 0.15, 0.85),
    "cyan": (0.10, 0.80, 0.85),
}
SIZES = {"small": (0.085, 0.110), "big": (0.150, 0.180)}  # radii
FILLS = ("solid", "hollow")
TONES = {"dark": (0.15, 0.30), "light": (0.60, 0.75)}  # grey levels
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

EXTENT = 1.3  # no shape reaches further from its centre than this many radii
GAP = 0.05  # between objects
SPEED = (0.020, 0.035)  # widths per frame
MOST_OBJECTS = 3
_TRIES = 60


@dataclass(frozen=True)
class Object:
    """One shape. `x`, `y` is its centre of mass; `vx`, `vy` is what it moves by in each frame."""

    shape: str
    colour: str
    size: str
    fill: str
    x: float
    y: float
    radius: float
    vx: float = 0.0
    vy: float = 0.0

    @property
    def motion(self) -> str:
        """The word for its direction: left, right, up, down or still."""
        if max(abs(self.vx), abs(self.vy)) < SPEED[0] / 2:
            return "still"
        if abs(self.vx) >= abs(self.vy):
            return "right" if self.vx > 0 else "left"
        return "down" if self.vy > 0 else "up"

    def at(self, frame: float) -> Object:
        """The object as it stands `frame` frames later."""
        return replace(self, x=self.x + frame * self.vx, y=self.y + frame * self.vy)


@dataclass(frozen=True)
class Ground:
    """A grey plane: `level` in the middle, rising by `shade` towards `angle` (radians)."""

    tone: str
    level: float
    shade: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Objects in the order in which the caption names them, and the ground behind them."""

    objects: tuple[Object, ...]
    ground: Ground

    @property
    def relation(self) -> str | None:
        """Where the first of two objects is, seen from the second; None for other counts."""
        if len(self.objects) != 2:
            return None
        return relation(*self.objects)

    def at(self, frame: float) -> Scene:
        """The scene `frame` frames later."""
        return replace(self, objects=tuple(thing.at(frame) for thing in self.objects))


def relation(first: Object, second: Object) -> str:
    """`left`, `right`, `above` or `below`: where `first` is, seen from `second`."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def draw(seed: int, *, num_objects: int | None = None, frames: int = 1) -> Scene:
    """The scene of that seed; the same on every machine.

    Args:
        num_objects: 1 to 3; None draws it too (of clips: 1 or 2).
        frames: above 1 the objects move, stay inside and stay apart for that many frames.

    Raises:
        HastenError: where a number is out of range.
    """
    if num_objects is not None and not 1 <= num_objects <= MOST_OBJECTS:
        raise HastenError(f"num_objects is {num_objects}; give 1 to {MOST_OBJECTS}")
    if frames < 1:
        raise HastenError(f"frames is {frames}; give 1 or more")
    # Only `random()` is promised to give the same numbers in every version of Python.
    chance = random.Random(seed).random
    most = MOST_OBJECTS if frames == 1 else 2
    count = 1 + int(chance() * most) if num_objects is None else num_objects
    tone = _pick(chance(), tuple(TONES))
    ground = Ground(tone, _between(chance(), TONES[tone]), 0.1 * chance(), 2 * math.pi * chance())
    while True:
        looks = [_look(chance(), chance(), chance(), chance(), chance()) for _ in range(count)]
        for _ in range(_TRIES):
            objects = tuple(
                _place(look, chance(), chance(), chance(), chance(), frames) for look in looks
            )
            scene = Scene(objects, ground)
            if _is_clear(scene, frames):
                return scene


def draw_many(num: int, seed: int, *, start: int = 0, frames: int = 1) -> list[Scene]:
    """Scenes number `start` to `start + num - 1` of a seed; different seeds share none."""
    return [draw((seed << 32) + start + i, frames=frames) for i in range(num)]


_Look = tuple[str, str, str, str, float]


def _look(a: float, b: float, c: float, d: float, e: float) -> _Look:
    size = _pick(c, tuple(SIZES))
    return (
        _pick(a, SHAPES),
        _pick(b, tuple(COLOURS)),
        size,
        _pick(d, FILLS),
        _between(e, SIZES[size]),
    )


def _place(look: _Look, a: float, b: float, c: float, d: float, frames: int) -> Object:
    shape, colour, size, fill, radius = look
    inside = (EXTENT * radius, 1 - EXTENT * radius)
    vx = vy = 0.0
    if frames > 1:
        speed = _between(d, SPEED)
        vx, vy = (speed * part for part in MOTIONS[_pick(c, tuple(MOTIONS))])
    return Object(
        shape, colour, size, fill, _between(a, inside), _between(b, inside), radius, vx, vy
    )


def _is_clear(scene: Scene, frames: int) -> bool:
    """Whether nothing touches or leaves the picture, and two still objects relate clearly."""
    objects = scene.objects
    for thing in objects:
        # Paths are straight and the picture is convex, so both ends being inside is enough.
        end = thing.at(frames - 1)
        reach = EXTENT * thing.radius
        if not (reach <= end.x <= 1 - reach and reach <= end.y <= 1 - reach):
            return False
    for i, first in enumerate(objects):
        for second in objects[i + 1 :]:
            least = EXTENT * (first.radius + second.radius) + GAP
            for frame in range(frames):
                a, b = first.at(frame), second.at(frame)
                if math.hypot(a.x - b.x, a.y - b.y) < least:
                    return False
    if len(objects) == 2 and frames == 1:
        near, far = sorted((abs(objects[0].x - objects[1].x), abs(objects[0].y - objects[1].y)))
        return far >= 1.4 * near  # neither "left of" nor "above" would be plain otherwise
    return True


def _pick(chance: float, names: Sequence[str]) -> str:
    return names[int(chance * len(names))]


def _between(chance: float, bounds: tuple[float, float]) -> float:
    return bounds[0] + chance * (bounds[1] - bounds[0])
