"""A small network that has learnt to see scenes; its features measure how alike pictures are.

The exact reader says what a picture shows. The judge says how it looks: the Frechet distance
compares the features of two sets of pictures, the perceptual distance those of two pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.errors import HastenError
from hasten.zoo.scenes.render import render
from hasten.zoo.scenes.scene import COLOURS, FILLS, MOST_OBJECTS, SHAPES, SIZES, TONES, Scene

SIZE = 64  # pictures of other sizes are scaled to this
FEATURES = 64
CELLS = 4  # features say where objects are on a grid of this many cells a side
FINE_CELLS = 8  # and in training each object is named in its cell of this grid
WEIGHTS = "judge.safetensors"

_KINDS = {"shape": SHAPES, "size": tuple(SIZES), "fill": FILLS}
LABELS = (
    *(f"{count} objects" for count in range(1, MOST_OBJECTS + 1)),
    *(f"{tone} ground" for tone in TONES),
    *(f"{colour} {word}" for words in _KINDS.values() for word in words for colour in COLOURS),
    *(f"object in row {row} column {column}" for row in range(CELLS) for column in range(CELLS)),
    "noisy",
    "blurred",
)
_NAMES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "fill": FILLS}
_PLACES = {label: place for place, label in enumerate(LABELS)}


class Judge(nn.Module):
    """Says which of LABELS are true of a picture. Pictures are (pictures, 3, size, size), 0 to 1.

    `scale` is what features are multiplied by; it gives them a mean variance of 1 over scenes.
    """

    scale: Tensor

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 96)) -> None:
        super().__init__()
        first, second, third = widths
        self.stages = nn.ModuleList(
            [
                nn.Sequential(_conv(3, first, stride=2), _conv(first, first)),
                nn.Sequential(_conv(first, second, stride=2), _conv(second, second)),
                nn.Sequential(_conv(second, third, stride=2), _conv(third, third)),
            ]
        )
        self.squeeze = _conv(third, 32, stride=2)
        self.features_of = nn.Linear(third + 32 * CELLS**2, FEATURES)
        self.head = nn.Linear(FEATURES, len(LABELS))
        # One number for "an object is centred here", then one for each name of each kind.
        self.namer = nn.Conv2d(third, 1 + sum(map(len, _NAMES.values())), 1)
        self.register_buffer("scale", torch.ones(()))

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """What each stage sees: (pictures, channels, 32, 32), then 16 by 16, then 8 by 8."""
        if pictures.shape[-1] != SIZE:
            pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        seen, found = 2 * pictures - 1, []
        for stage in self.stages:
            seen = stage(seen)
            found.append(seen)
        return found

    def features(self, pictures: Tensor) -> Tensor:
        """(pictures, FEATURES), before the last non-linearity."""
        return self._features(self.maps(pictures)[-1]) * self.scale

    def _features(self, seen: Tensor) -> Tensor:
        located = self.squeeze(seen).flatten(1)
        features: Tensor = self.features_of(torch.cat([seen.mean(dim=(2, 3)), located], dim=1))
        return features

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the labels (pictures, labels), and of what is where (pictures, names, 8, 8)."""
        seen = self.maps(pictures)[-1]
        return self.head(F.silu(self._features(seen))), self.namer(seen)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def labels(scenes: Sequence[Scene]) -> Tensor:
    """Which of LABELS hold of clean pictures: (scenes, labels), 0 or 1."""
    true = torch.zeros(len(scenes), len(LABELS))
    for row, scene in zip(true, scenes, strict=True):
        row[_PLACES[f"{len(scene.objects)} objects"]] = 1
        row[_PLACES[f"{scene.ground.tone} ground"]] = 1
        for thing in scene.objects:
            for kind in _KINDS:
                row[_PLACES[f"{thing.colour} {getattr(thing, kind)}"]] = 1
            cell = f"row {int(thing.y * CELLS)} column {int(thing.x * CELLS)}"
            row[_PLACES[f"object in {cell}"]] = 1
    return true


def names(scenes: Sequence[Scene]) -> Tensor:
    """What is centred where: (scenes, 4, 8, 8), places of shape, colour, size, fill; -1 for none."""
    found = torch.full((len(scenes), len(_NAMES), FINE_CELLS, FINE_CELLS), -1)
    for grid, scene in zip(found, scenes, strict=True):
        for thing in scene.objects:
            words = [kind.index(getattr(thing, name)) for name, kind in _NAMES.items()]
            grid[:, int(thing.y * FINE_CELLS), int(thing.x * FINE_CELLS)] = torch.tensor(words)
    return found


def load_judge(folder: Path | None = None) -> Judge:
    """The judge that ships with hasten, or the one in `folder`; in eval mode.

    Raises:
        HastenError: where its weights are missing or damaged.
    """
    if folder is None:
        from hasten.zoo.catalogue import part_path

        folder = part_path("scenes-judge")
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        judge = Judge(tuple(card["recipe"]["widths"]))
        judge.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise HastenError(
            f"the judge in {folder} cannot be read ({error}); train it again: "
            "hasten train scenes-judge"
        ) from error
    return judge.eval().requires_grad_(False)


def save_judge(judge: Judge, folder: Path) -> None:
    """Write the weights, in bf16."""
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in judge.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)


@torch.no_grad()
def features(judge: Judge, pictures: Tensor, *, chunk: int = 128) -> Tensor:
    """Features (pictures, FEATURES) of many pictures, float64."""
    parts = [judge.features(part.float().clamp(0, 1)) for part in pictures.split(chunk)]
    return torch.cat(parts).double()


def frechet(first: Tensor, second: Tensor, *, shrink: float = 0.0) -> float:
    """Frechet distance between normal distributions fitted to two sets of features.

    It is 0 for equal sets and grows as sets shrink, so compare only at equal counts.

    Args:
        first, second: (pictures, features), 2 pictures or more.
        shrink: how far covariances are moved towards their mean variance, which few pictures need.

    Raises:
        HastenError: where there are fewer.
    """
    if min(len(first), len(second)) < 2:
        raise HastenError("the Frechet distance needs 2 pictures or more on each side")
    first, second = first.double(), second.double()
    gap = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    one, two = _covariance(first, shrink), _covariance(second, shrink)
    # tr sqrt(one two) is the sum of the roots of the eigenvalues of sqrt(one) two sqrt(one).
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(gap + one.trace() + two.trace() - 2 * cross))


def _covariance(values: Tensor, shrink: float) -> Tensor:
    """(features, features) of values (pictures, features)."""
    found = torch.atleast_2d(values.T.cov())
    ball = torch.eye(len(found), dtype=found.dtype) * found.diagonal().mean()
    return torch.lerp(found, ball, shrink)


@torch.no_grad()
def perceptual(judge: Judge, first: Tensor, second: Tensor) -> Tensor:
    """Distance of each pair of pictures as the judge sees them: (pictures,), 0 for equal ones.

    At every place of every stage the channels are scaled to length 1; the squared differences are
    averaged over places and summed over stages.
    """
    if first.shape != second.shape:
        raise HastenError(
            f"pictures of the shapes {tuple(first.shape)} and {tuple(second.shape)} cannot be "
            "compared pair by pair; give as many of the same size"
        )
    total = torch.zeros(len(first))
    pairs = zip(
        judge.maps(first.float().clamp(0, 1)), judge.maps(second.float().clamp(0, 1)), strict=True
    )
    for one, two in pairs:
        difference = F.normalize(one, dim=1) - F.normalize(two, dim=1)
        total += difference.square().sum(dim=1).mean(dim=(1, 2))
    return total


@dataclass(frozen=True)
class Marked:
    """Pictures (pictures, 3, size, size) with their `labels` and `names`."""

    pictures: Tensor
    labels: Tensor
    names: Tensor

    def to(self, device: torch.device | str) -> Marked:
        return Marked(self.pictures.to(device), self.labels.to(device), self.names.to(device))


def mark(scenes: Sequence[Scene]) -> Marked:
    """Clean pictures of 64 pixels with all that is true of them."""
    return Marked(render(scenes, SIZE), labels(scenes), names(scenes))


def judge_loss(model: nn.Module, batch: Marked) -> tuple[Tensor, dict[str, float]]:
    """`loss_fn` of `training.loop.fit`: is each label true, and what is where?"""
    spoilt = spoil(batch)
    whole, local = model(spoilt.pictures)
    loss = 10 * F.binary_cross_entropy_with_logits(whole.float(), spoilt.labels)
    there = batch.names[:, 0] >= 0
    local = local.float().permute(0, 2, 3, 1)
    loss = loss + 10 * F.binary_cross_entropy_with_logits(local[..., 0], there.float())
    named = local[there][:, 1:].split([len(kind) for kind in _NAMES.values()], dim=1)
    true = batch.names.permute(0, 2, 3, 1)[there]
    for logits, right in zip(named, true.T, strict=True):
        loss = loss + F.cross_entropy(logits, right)
    return loss, {}


def spoil(batch: Marked) -> Marked:
    """Add noise to a quarter of the pictures and blur another, and label them so.

    The judge must notice both, or its distances would be blind to them, and see through both.
    """
    pictures, true = batch.pictures.clone(), batch.labels.clone()
    quarter = len(pictures) // 4
    noisy, blurred = slice(0, quarter), slice(quarter, 2 * quarter)
    strength = 0.03 + 0.12 * torch.rand(quarter, 1, 1, 1)
    pictures[noisy] += strength * torch.randn_like(pictures[noisy])
    pictures[blurred] = F.avg_pool2d(pictures[blurred], 3, 1, 1, count_include_pad=False)
    true[noisy, _PLACES["noisy"]] = 1
    true[blurred, _PLACES["blurred"]] = 1
    return Marked(pictures.clamp(0, 1), true, batch.names)


@torch.no_grad()
def judge_quality(judge: nn.Module, batch: Marked) -> dict[str, float]:
    """Accuracy over labels, and of the names of objects where their centres are."""
    whole, local = map(torch.cat, zip(*map(judge, batch.pictures.split(128)), strict=True))
    found = {"labels": float(((whole > 0) == (batch.labels > 0.5)).float().mean())}
    there = batch.names[:, 0] >= 0
    named = local.permute(0, 2, 3, 1)[there][:, 1:]
    true = batch.names.permute(0, 2, 3, 1)[there]
    parts = named.split([len(kind) for kind in _NAMES.values()], dim=1)
    for name, logits, right in zip(_NAMES, parts, true.T, strict=True):
        found[name] = float((logits.argmax(dim=1) == right).float().mean())
    return found


@torch.no_grad()
def set_scale(judge: Judge, pictures: Tensor) -> None:
    """Choose `scale` by pictures of scenes."""
    judge.scale.fill_(1.0)
    spread = features(judge, pictures).var(dim=0).mean()
    judge.scale.copy_(spread.rsqrt())
