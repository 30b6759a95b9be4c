"""What a list of steps is worth on a pipeline: how near its pictures come to reference pictures.

Pictures are drawn from the same noises for every list, so that lists are compared and not their luck.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten.denoise.inputs import call_arguments
from hasten.denoise.run import Run, Slots
from hasten.denoise.schedule.evolution import Genome, full
from hasten.denoise.schedule.grid import times

if TYPE_CHECKING:
    from hasten.denoise.schedule.auto_diffusion import AutoDiffusion
    from hasten.preparation import Preparation

Features = Callable[[Tensor], Tensor]
"""Takes (n, 3, height, width) pictures from 0 to 1; gives (n, dim) features."""

REFERENCE_STEPS = 50  # of a pipeline's own pictures that it is compared with
SHRINK = 0.05  # of the covariance, towards its mean variance


@dataclass
class Fitness:
    """What a list is worth on a pipeline; lower is better.

    Attributes:
        arguments: of the pipeline's call, for each batch of prompts.
        real: (n, dim) features of reference pictures.
    """

    technique: AutoDiffusion
    pipe: Any
    features: Features
    arguments: list[dict[str, Any]]
    real: Tensor

    @classmethod
    def of(cls, technique: AutoDiffusion, preparation: Preparation) -> Fitness:
        """For a preparation, with its prompts, features and reference."""
        given = dict(preparation.arguments)
        features = given.pop("features", None) or scene_features()
        real = given.pop("real", None)
        pipe, batch = preparation.subject.pipe, technique.batch
        chance = torch.Generator().manual_seed(technique.seed)
        prompts = preparation.draw(technique.samples, chance)
        arguments = [
            call_arguments(pipe, prompts[i : i + batch], output_type="pt", **given)
            for i in range(0, len(prompts), batch)
        ]
        made = cls(technique, pipe, features, arguments, torch.empty(0))
        made.real = made._reference(preparation, real)
        return made

    def _reference(self, preparation: Preparation, real: Any) -> Tensor:
        if real is not None:
            return real if real.ndim == 2 else self.features(real)
        if preparation.subject.name.startswith("scenes-"):
            from hasten.zoo.scenes.caption import prompts
            from hasten.zoo.scenes.render import render

            size = self._call(self.arguments[0], 0, None, self.technique.steps).shape[-1]
            scenes = [scene for _, scene in prompts(self.technique.samples, preparation.seed)]
            return self.features(render(scenes, size))
        return self.features(self.draw(None, steps=REFERENCE_STEPS))

    def uniform(self) -> Genome:
        """The scheduler's own list."""
        self._call(self.arguments[0], 0, None, self.technique.steps)
        return full(times(self.pipe.scheduler))

    def __call__(self, genome: Genome) -> float:
        from hasten.zoo.scenes.judge import frechet

        return frechet(self.features(self.draw(genome)), self.real, shrink=SHRINK)

    def draw(self, genome: Genome | None, *, steps: int | None = None) -> Tensor:
        """(samples, 3, height, width) pictures, always from the same noises."""
        steps = steps or self.technique.steps
        first, parts = 0, []
        for arguments in self.arguments:
            parts.append(self._call(arguments, first, genome, steps))
            first += len(parts[-1])
        pictures = torch.cat(parts)
        return pictures.flatten(0, 1) if pictures.ndim == 5 else pictures

    def _call(
        self, arguments: dict[str, Any], first: int, genome: Genome | None, steps: int
    ) -> Tensor:
        count = len(arguments.get("prompt") or arguments["class_labels"])
        seeds = [self.technique.seed * 1_000_003 + first + i for i in range(count)]
        slots = Slots() if genome is None else Slots.fill([(self.technique, genome)])
        run = Run(self.pipe, slots)
        given = {
            "num_inference_steps": steps,
            **arguments,
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        }
        with run.attached():
            made = self.pipe(**given)
        pictures = made[0] if isinstance(made, tuple) else next(iter(made.values()))
        return torch.as_tensor(pictures).float().cpu()


def scene_features() -> Features:
    """Features of the judge of scenes, which ships with hasten."""
    from hasten.zoo.scenes.judge import features, load_judge

    judge = load_judge()
    return lambda pictures: features(judge, pictures)
