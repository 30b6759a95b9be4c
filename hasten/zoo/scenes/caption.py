"""Words for scenes: captions, questions with answers, and the prompts of benchmarks."""

from __future__ import annotations

from itertools import combinations

from hasten.errors import HastenError
from hasten.zoo.scenes.scene import Object, Scene, draw_many, relation

HELD_OUT = 1 << 20  # training draws from the seeds below, `prompts` from those above

_WHERE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def caption(scene: Scene, *, moving: bool = False) -> str:
    """What the scene shows, such as "a big red circle left of a small blue square on dark ground".

    Hollow shapes are called so and solid ones are not. Of two objects the relation is said, or,
    of a clip (`moving`), how each object moves.
    """
    names = [_name(thing, moving) for thing in scene.objects]
    if len(names) == 2 and not moving:
        text = f"{names[0]} {_WHERE[relation(*scene.objects)]} {names[1]}"
    elif len(names) < 2:  # nothing is what the reader may find in a poor picture
        text = names[0] if names else "nothing"
    else:
        text = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{text} on {scene.ground.tone} ground"


def prompts(num: int, seed: int = 0, *, frames: int = 1) -> list[tuple[str, Scene]]:
    """Captions with their scenes for benchmarks; no recipe trains on the scenes of these seeds.

    Raises:
        HastenError: where `num` is below 1.
    """
    if num < 1:
        raise HastenError(f"num is {num}; give 1 or more")
    scenes = draw_many(num, HELD_OUT + seed, frames=frames)
    return [(caption(scene, moving=frames > 1), scene) for scene in scenes]


def questions(scene: Scene) -> list[tuple[str, str]]:
    """Questions about a scene, each with its one right answer, in a fixed order."""
    objects = scene.objects
    found = [
        ("how many objects are there?", str(len(objects))),
        ("what tone is the ground?", scene.ground.tone),
    ]
    for thing in objects:
        same = [other for other in objects if other.colour == thing.colour]
        found.append((f"how many objects are {thing.colour}?", str(len(same))))
        if sum(other.shape == thing.shape for other in objects) == 1:
            found += [
                (f"what colour is the {thing.shape}?", thing.colour),
                (f"how big is the {thing.shape}?", thing.size),
                (f"is the {thing.shape} solid or hollow?", thing.fill),
            ]
        if len(same) == 1:
            found.append((f"what shape is the {thing.colour} object?", thing.shape))
    for first, second in combinations(objects, 2):
        if len(objects) == 2 and (first.colour, first.shape) != (second.colour, second.shape):
            where = relation(first, second)
            asked = f"{first.colour} {first.shape}", f"{second.colour} {second.shape}"
            found.append((f"is the {asked[0]} {_WHERE[where]} the {asked[1]}?", "yes"))
            found.append((f"is the {asked[1]} {_WHERE[where]} the {asked[0]}?", "no"))
    return list(dict.fromkeys(found))


def _name(thing: Object, moving: bool) -> str:
    fill = "hollow " if thing.fill == "hollow" else ""
    name = f"a {thing.size} {fill}{thing.colour} {thing.shape}"
    if not moving:
        return name
    return f"{name} standing still" if thing.motion == "still" else f"{name} moving {thing.motion}"
