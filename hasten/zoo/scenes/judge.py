"""A small network that has learnt to see scenes; its features measure how alike pictures are.

The exact reader says what a picture shows. The judge says how it looks: the Frechet distance
compares the features of two sets of pictures, the perceptual distance those of two pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hasten.errors import HastenError
from hasten.zoo.scenes.scene import COLOURS, FILLS, MOST_OBJECTS, SHAPES, SIZES, TONES, Scene

SIZE = 64  # pictures of other sizes are scaled to this
FEATURES = 64
CELLS = 4  # objects are located on a grid of this many cells a side
WEIGHTS = "judge.safetensors"

_KINDS = {"shape": SHAPES, "size": tuple(SIZES), "fill": FILLS}
LABELS = (
    *(f"{count} objects" for count in range(1, MOST_OBJECTS + 1)),
    *(f"{tone} ground" for tone in TONES),
    *(f"{colour} {word}" for words in _KINDS.values() for word in words for colour in COLOURS),
    *(f"object in row {row} column {column}" for row in range(CELLS) for column in range(CELLS)),
)
_PLACES = {label: place for place, label in enumerate(LABELS)}


class Judge(nn.Module):
    """Says which of LABELS are true of a picture. Pictures are (pictures, 3, size, size), 0 to 1."""

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
        self.features_of = nn.Linear(32 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, len(LABELS))

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
        squeezed = self.squeeze(self.maps(pictures)[-1])
        features: Tensor = self.features_of(squeezed.flatten(1))
        return features

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits (pictures, labels)."""
        logits: Tensor = self.head(F.silu(self.features(pictures)))
        return logits


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def labels(scenes: Sequence[Scene]) -> Tensor:
    """Which of LABELS hold: (scenes, labels), 0 or 1."""
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


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance between normal distributions fitted to two sets of features.

    It is 0 for equal sets and grows as sets shrink, so compare only at equal counts.

    Args:
        first, second: (pictures, features), 2 pictures or more.

    Raises:
        HastenError: where there are fewer.
    """
    if min(len(first), len(second)) < 2:
        raise HastenError("the Frechet distance needs 2 pictures or more on each side")
    first, second = first.double(), second.double()
    gap = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    one, two = first.T.cov(), second.T.cov()
    # tr sqrt(one two) is the sum of the roots of the eigenvalues of sqrt(one) two sqrt(one).
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(gap + one.trace() + two.trace() - 2 * cross))


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


class JudgeLoss:
    """`loss_fn` of `training.loop.fit`: is each label true? Half of the pictures are spoilt.

    Spoilt by noise and blur that leave the answer as it is: the features must be good for
    pictures that a sampler did not finish.
    """

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        logits = model(spoil(batch.pictures))
        loss = F.binary_cross_entropy_with_logits(logits.float(), batch.labels)
        return loss * len(LABELS), {}


def spoil(pictures: Tensor) -> Tensor:
    """Add noise of up to 0.1 to a quarter of the pictures and blur another."""
    spoilt = pictures.clone()
    quarter = len(pictures) // 4
    if quarter:
        noise = 0.1 * torch.rand(quarter, 1, 1, 1) * torch.randn_like(spoilt[:quarter])
        spoilt[:quarter] += noise
        blurred = F.avg_pool2d(spoilt[quarter : 2 * quarter], 3, 1, 1, count_include_pad=False)
        spoilt[quarter : 2 * quarter] = blurred
    return spoilt.clamp(0, 1)


@torch.no_grad()
def judge_quality(judge: nn.Module, pictures: Tensor, true: Tensor) -> dict[str, float]:
    """Accuracy over labels, and the share of pictures with every label right."""
    right = torch.cat([(judge(part) > 0) for part in pictures.split(128)]) == (true > 0.5)
    return {
        "accuracy": float(right.float().mean()),
        "exact": float(right.all(dim=1).float().mean()),
    }
