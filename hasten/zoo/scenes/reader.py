"""Reads a picture back into its scene, without a network.

The ground is grey and every object is of one strong colour, so what a pixel has of colour, apart
from its brightness, says how much of an object covers it and of which. Connected regions of one
colour are the objects; their area and centre fix the size and place of each shape that they could
be, and the shape whose outline fits best is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from hasten.errors import HastenError
from hasten.zoo.scenes.render import area, cover
from hasten.zoo.scenes.scene import COLOURS, FILLS, SHAPES, SIZES, TONES, Ground, Object, Scene

UNCLEAR = "unclear"  # the shape and fill of a region that looks like no object

_SMALLEST_MASS = 0.004  # of the picture's area; the smallest object covers 0.01
_COVERED = 0.35  # a pixel belongs to a region where its object covers this much of it
_WORST_FIT = 0.35  # squared misfit of an outline over the mass of the region
_LIMIT_OF_SMALL = (SIZES["small"][1] + SIZES["big"][0]) / 2
_LIMIT_OF_DARK = (TONES["dark"][1] + TONES["light"][0]) / 2

_CANDIDATES = [(shape, fill) for shape in SHAPES for fill in FILLS]


def read(pictures: Tensor) -> list[Scene]:
    """The scenes that pictures show.

    Objects come from left to right. A region that fits no shape has the shape and fill "unclear".

    Args:
        pictures: (pictures, 3, size, size) or one picture (3, size, size), from 0 to 1.

    Raises:
        HastenError: where the shape is another, the size is below 16 or a value is not finite.
    """
    pictures = _checked(pictures)
    found: list[Scene] = []
    with torch.autocast("cpu", enabled=False):  # bf16 would blur what is measured
        for part in pictures.split(32):
            smooth, passes = _smooth(part)
            found += _read(smooth, passes)
    return found


@dataclass(frozen=True)
class Attributes:
    """What of a wanted scene a picture shows.

    Attributes:
        share: of all wanted attributes, 0 to 1.
        exact: whether all are there and nothing else is.
        found: 0 to 1 for each kind: count, ground, colour, shape, size, fill, relation (where two
            objects are wanted).
    """

    share: float
    exact: bool
    found: dict[str, float]


def attributes(pictures: Tensor, wanted: Sequence[Scene]) -> list[Attributes]:
    """Compare pictures with the scenes that they should show.

    Wanted are the number of objects, the ground's tone, each object's colour, shape, size and
    fill, and where the first of two objects stands. Only an object of the right colour counts as
    found: shape, size, fill and relation are looked for in found ones. Objects are matched so that
    most is right.

    Args:
        pictures: as `read`.
        wanted: as many scenes as pictures.
    """
    scenes = read(pictures)
    if len(scenes) != len(wanted):
        raise HastenError(f"{len(scenes)} pictures and {len(wanted)} wanted scenes; give as many")
    return [compare(scene, other) for scene, other in zip(scenes, wanted, strict=True)]


def compare(shown: Scene, wanted: Scene, *, relation: bool = True) -> Attributes:
    """As `attributes`, of one scene that was read before.

    Args:
        relation: whether the relation of two objects is wanted.
    """
    objects, holds = _best_match(shown, wanted, wanted.relation if relation else None)
    found = {
        "count": float(len(shown.objects) == len(wanted.objects)),
        "ground": float(shown.ground.tone == wanted.ground.tone),
    }
    weights = {"count": 1, "ground": 1}
    for kind, hits in objects.items():
        found[kind] = hits / len(wanted.objects)
        weights[kind] = len(wanted.objects)
    if holds is not None:
        found["relation"] = float(holds)
        weights["relation"] = 1
    share = sum(found[kind] * weights[kind] for kind in found) / sum(weights.values())
    return Attributes(share, all(value == 1 for value in found.values()), found)


def mean_attributes(results: Sequence[Attributes]) -> dict[str, float]:
    """Means over pictures: `attributes` (the shares), `exact`, and each kind."""
    kinds = dict.fromkeys(kind for result in results for kind in result.found)
    means = {
        "attributes": _mean([result.share for result in results]),
        "exact": _mean([float(result.exact) for result in results]),
    }
    for kind in kinds:
        means[kind] = _mean([r.found[kind] for r in results if kind in r.found])
    return means


_KINDS = ("colour", "shape", "size", "fill")


def _best_match(
    shown: Scene, wanted: Scene, relation: str | None
) -> tuple[dict[str, int], bool | None]:
    """How many objects have each attribute under the best pairing, and whether the relation holds.

    Where too few objects are shown, those missing have nothing.
    """
    best: tuple[float, dict[str, int], bool | None] | None = None
    places = list(range(max(len(shown.objects), len(wanted.objects))))
    for order in permutations(places[:6], len(wanted.objects)):
        pairs = [
            (shown.objects[i] if i < len(shown.objects) else None, thing)
            for i, thing in zip(order, wanted.objects, strict=True)
        ]
        found = [
            (seen, thing)
            for seen, thing in pairs
            if seen is not None and seen.colour == thing.colour
        ]
        hits = {
            kind: sum(getattr(seen, kind) == getattr(thing, kind) for seen, thing in found)
            for kind in _KINDS
        }
        holds = None
        if relation is not None:
            holds = len(found) == 2 and _holds(relation, found[0][0], found[1][0])
        score = sum(hits.values()) + bool(holds)
        if best is None or score > best[0]:
            best = score, hits, holds
    assert best is not None
    return best[1], best[2]


def _holds(relation: str, first: Object, second: Object) -> bool:
    dx, dy = first.x - second.x, first.y - second.y
    signed = {"left": -dx, "right": dx, "above": -dy, "below": dy}
    return signed[relation] > 0.05


def _checked(pictures: Tensor) -> Tensor:
    if pictures.ndim == 3:
        pictures = pictures[None]
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] != pictures.shape[3]:
        raise HastenError(
            f"pictures have the shape {tuple(pictures.shape)}; give (pictures, 3, size, size)"
        )
    if pictures.shape[-1] < 16:
        raise HastenError(f"pictures have {pictures.shape[-1]} pixels a side; give 16 or more")
    pictures = pictures.detach().float().cpu()
    if not bool(pictures.isfinite().all()):
        raise HastenError("a picture holds values that are not finite")
    return pictures


def _noise(pictures: Tensor) -> Tensor:
    """The standard deviation of each picture's pixel noise, from what no smooth surface has."""
    kernel = torch.tensor([[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]) / 6
    grey = pictures.mean(dim=1, keepdim=True)
    rough = conv2d(grey, kernel[None, None]).abs().flatten(1)
    # The median leaves edges out; 0.6745 turns it into a standard deviation, 3 channels into one.
    return rough.median(dim=1).values / 0.6745 * 3**0.5


_BINOMIAL = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16


def _blur(planes: Tensor) -> Tensor:
    """(n, planes, size, size) under a 3x3 binomial filter."""
    n, count = planes.shape[:2]
    padded = pad(planes.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
    return conv2d(padded, _BINOMIAL[None, None])[:, 0].unflatten(0, (n, count))


def _smooth(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Blur noisy pictures until little noise is left; and how often each was blurred."""
    noise = _noise(pictures)
    passes = (noise > 0.03).int() + (noise > 0.08).int() + (noise > 0.16).int()
    smooth = pictures.clone()
    for number in range(1, int(passes.max()) + 1 if len(passes) else 1):
        chosen = (passes >= number).nonzero()[:, 0]
        smooth[chosen] = _blur(smooth[chosen])
    return smooth, passes


def _colourfulness() -> tuple[Tensor, Tensor]:
    """Unit directions (colours, 3) of the colours without their brightness, and their lengths."""
    colours = torch.tensor(list(COLOURS.values()))
    plain = colours - colours.mean(dim=1, keepdim=True)
    length = plain.norm(dim=1)
    return plain / length[:, None], length


def _read(pictures: Tensor, passes: Tensor) -> list[Scene]:
    size = pictures.shape[-1]
    directions, lengths = _colourfulness()
    plain = pictures - pictures.mean(dim=1, keepdim=True)
    along = torch.einsum("kc,nchw->nkhw", directions, plain)
    strongest, colour = along.max(dim=1)
    covered = strongest / lengths[colour]
    region_of = torch.where(covered > _COVERED, colour + 1, 0)  # 0 is the ground
    labels, owners, colours = _regions(region_of.numpy())
    regions = _outlines(along / lengths[:, None, None], region_of, labels, owners, colours)
    grounds = _grounds(pictures, region_of)
    objects: list[list[Object]] = [[] for _ in grounds]
    for owner, thing in _fit(regions, passes, size):
        objects[owner].append(thing)
    return [
        Scene(tuple(sorted(things, key=lambda thing: thing.x)), ground)
        for things, ground in zip(objects, grounds, strict=True)
    ]


def _regions(kind: np.ndarray) -> tuple[np.ndarray, list[int], list[int]]:
    """Number the connected regions (8 neighbours) of equal kind above 0.

    Args:
        kind: (pictures, size, size).

    Returns:
        The number of each pixel's region, -1 for none; and of each region the picture and kind.
    """
    # Rows are cut into runs of one kind; runs that touch in neighbouring rows are one region.
    n, height, width = kind.shape
    rows = kind.reshape(n * height, width)
    edge = np.ones((len(rows), 1), bool)
    starts = np.concatenate([edge, rows[:, 1:] != rows[:, :-1]], axis=1) & (rows > 0)
    ends = np.concatenate([rows[:, 1:] != rows[:, :-1], edge], axis=1) & (rows > 0)
    row, begin = np.nonzero(starts)
    end = np.nonzero(ends)[1] + 1
    kinds = rows[row, begin]
    parent = list(range(len(row)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_of_row = np.searchsorted(row, np.arange(len(rows) + 1)).tolist()
    row_list, begins, end_list, kind_list = (
        row.tolist(),
        begin.tolist(),
        end.tolist(),
        kinds.tolist(),
    )
    for i, line in enumerate(row_list):
        if line % height == 0:
            continue
        for j in range(first_of_row[line - 1], first_of_row[line]):
            touch = begins[j] <= end_list[i] and begins[i] <= end_list[j]
            if touch and kind_list[i] == kind_list[j]:
                parent[root(i)] = root(j)
    roots = [root(i) for i in range(len(parent))]
    number = {r: place for place, r in enumerate(dict.fromkeys(roots))}
    labels = np.full(rows.shape, -1)
    for i, r in enumerate(roots):
        labels[row_list[i], begins[i] : end_list[i]] = number[r]
    owners = [row_list[r] // height for r in number]
    return labels.reshape(kind.shape), owners, [kind_list[r] - 1 for r in number]


@dataclass(frozen=True)
class _Outlines:
    """Regions that are large enough to be objects.

    Attributes:
        owner: (regions,) the picture of each.
        colour: (regions,) place in COLOURS.
        cover: (regions, size, size) how much of each pixel the object covers.
        near: (regions, size, size) bool, pixels that could be touched by the object.
    """

    owner: Tensor
    colour: Tensor
    cover: Tensor
    near: Tensor


def _outlines(
    covers: Tensor, region_of: Tensor, labels: np.ndarray, owners: list[int], colours: list[int]
) -> _Outlines:
    size = covers.shape[-1]
    counts = np.bincount(labels[labels >= 0], minlength=len(owners))
    large = np.nonzero(counts >= _SMALLEST_MASS * size * size * 0.6)[0]
    numbers = torch.from_numpy(labels)
    owner = torch.tensor([owners[i] for i in large], dtype=torch.long)
    colour = torch.tensor([colours[i] for i in large], dtype=torch.long)
    own = numbers[owner] == torch.from_numpy(large)[:, None, None]
    grown = own.float()[:, None]
    for _ in range(2):
        grown = torch.nn.functional.max_pool2d(grown, 3, stride=1, padding=1)
    holes = _filled(own)
    others = (region_of[owner] > 0) & ~own
    near = ((grown[:, 0] > 0) | holes) & ~others
    return _Outlines(owner, colour, covers[owner, colour] * near, near)


def _filled(own: Tensor) -> Tensor:
    """The rows and columns that a region spans: its inside is among them."""
    across = own.cummax(dim=2).values & own.flip(2).cummax(dim=2).values.flip(2)
    down = own.cummax(dim=1).values & own.flip(1).cummax(dim=1).values.flip(1)
    return across & down


def _fit(regions: _Outlines, passes: Tensor, size: int) -> list[tuple[int, Object]]:
    """Each region as the object that fits it best, with its picture."""
    mass = regions.cover.sum(dim=(1, 2)) / size**2
    chosen = (mass >= _SMALLEST_MASS).nonzero()[:, 0]
    if not len(chosen):
        return []
    seen, near, mass = regions.cover[chosen], regions.near[chosen], mass[chosen]
    axis = (torch.arange(size) + 0.5) / size
    x = (seen.sum(dim=1) * axis).sum(dim=1) / mass / size**2
    y = (seen.sum(dim=2) * axis).sum(dim=1) / mass / size**2
    blurs = passes[regions.owner[chosen]]
    misfits, radii = [], []
    for shape, fill in _CANDIDATES:
        radius = (mass / area(shape, fill)).sqrt()
        drawn = cover(
            torch.full((len(x),), SHAPES.index(shape)),
            torch.full((len(x),), fill == "hollow"),
            torch.stack([x, y, radius], dim=1),
            size,
        )
        for number in range(1, int(blurs.max()) + 1):
            some = (blurs >= number).nonzero()[:, 0]
            drawn[some] = _blur(drawn[some][:, None])[:, 0]
        misfit = ((drawn - seen).square() * near).sum(dim=(1, 2))
        misfits.append((misfit + (drawn.square() * ~near).sum(dim=(1, 2))) / size**2 / mass)
        radii.append(radius)
    least, best = torch.stack(misfits).min(dim=0)
    found = []
    for i, index in enumerate(chosen.tolist()):
        shape, fill = _CANDIDATES[int(best[i])]
        reach = float(radii[int(best[i])][i])
        if float(least[i]) > _WORST_FIT:
            shape = fill = UNCLEAR
        thing = Object(
            shape,
            list(COLOURS)[int(regions.colour[index])],
            "small" if reach < _LIMIT_OF_SMALL else "big",
            fill,
            float(x[i]),
            float(y[i]),
            reach,
        )
        found.append((int(regions.owner[index]), thing))
    return found


def _grounds(pictures: Tensor, region_of: Tensor) -> list[Ground]:
    """A plane of grey through the pixels of no object, by least squares."""
    size = pictures.shape[-1]
    axis = (torch.arange(size) + 0.5) / size - 0.5
    x, y = axis.expand(size, size).flatten(), axis[:, None].expand(size, size).flatten()
    basis = torch.stack([torch.ones_like(x), x, y], dim=1)
    weight = (region_of == 0).flatten(1).float()
    grey = pictures.mean(dim=1).flatten(1)
    normal = torch.einsum("np,pi,pj->nij", weight, basis, basis) + 1e-3 * torch.eye(3)
    right = torch.einsum("np,pi,np->ni", weight, basis, grey)
    planes = torch.linalg.solve(normal, right)
    shade, angle = planes[:, 1:].norm(dim=1), torch.atan2(planes[:, 2], planes[:, 1])
    return [
        Ground("dark" if level < _LIMIT_OF_DARK else "light", level, rise, turn % (2 * np.pi))
        for level, rise, turn in zip(
            planes[:, 0].tolist(), shade.tolist(), angle.tolist(), strict=True
        )
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
