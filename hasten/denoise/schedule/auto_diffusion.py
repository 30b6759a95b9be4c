"""AutoDiffusion: the timesteps of a short sampler are searched for, not spread evenly.

"AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion
Model Acceleration" (arXiv 2309.10438), after the reference code. `prepare` runs an evolutionary search
over lists of timesteps. A list is worth the Frechet distance between features of what it draws, from
the same noises each time, and features of reference pictures. The pipeline then walks the list with
its own solver, whose coefficients follow the uneven gaps.

Ours: features come from the judge of scenes unless a function is given; reference pictures are real
scenes for the models of the zoo, and the pipeline's own at many steps for any other. The covariance
is shrunk, because few pictures are drawn. The search over layers that are left out is not built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hasten.denoise.inputs import call_arguments
from hasten.denoise.levels import is_flow
from hasten.denoise.run import Run, Slots
from hasten.denoise.schedule.evolution import Evolution, Genome
from hasten.denoise.schedule.grid import check_grid, set_grid, times, training_steps
from hasten.denoise.slots import Schedule
from hasten.errors import HastenError
from hasten.technique import (
    Card,
    Claim,
    Contract,
    Loss,
    Parts,
    Resource,
    Rival,
    Slot,
    knob,
    technique,
)

Features = Callable[[Tensor], Tensor]
"""Takes (n, 3, height, width) pictures from 0 to 1; gives (n, dim) features."""

PARENTS = 0.2  # share of a generation from whose number of best lists new ones are made
COUNT = "num_inference_steps"
REFERENCE_STEPS = 50  # of a pipeline's own pictures that it is compared with
SHRINK = 0.05  # of the covariance, towards its mean variance


@technique("auto_diffusion")
@dataclass(frozen=True, kw_only=True)
class AutoDiffusion(Schedule):
    """Walks a few timesteps that a search has found."""

    card: ClassVar[Card] = Card(
        title="AutoDiffusion: Training-Free Optimization of Time Steps and Architectures",
        paper="auto_diffusion",
        family="diffusion",
        loss=Loss.LOSSY,
        link="https://arxiv.org/abs/2309.10438",
        year=2023,
        claims=(
            Claim("FID", 17.86, "ImageNet 64 px, ADM-G, 4 steps of DDIM; 138.66 for uniform ones"),
        ),
        rival=Rival("fewer_steps(steps={steps})", "frechet", "as many steps, spread evenly"),
        saves="calls",
        trained=True,
        notes=(
            "The list belongs to a number of steps, a solver and a guidance scale; prepare again where "
            "one of them changes. The search draws (generations + 1) * population * samples pictures, "
            "and none of that is in any time that is reported. It takes the place of the number of "
            "steps that a call asks for."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.SCHEDULE,), changes=frozenset({Resource.TIMESTEPS})
    )
    part_knobs: ClassVar[tuple[str, ...]] = ("steps", "search", "seed")

    steps: int = knob(
        4, "timesteps that are walked; fewer gain more from a search", low=1, high=100
    )
    search: str = knob(
        "evolution",
        "how lists are found: by evolution, or by chance with as many tries (an ablation)",
        choices=("evolution", "random"),
    )
    population: int = knob(24, "lists of a generation; the paper takes 50", low=2)
    generations: int = knob(8, "generations after the first; the paper takes 10", low=0)
    samples: int = knob(256, "pictures by which a list is judged; the paper takes 1000", low=2)
    batch: int = knob(32, "pictures that are drawn together in the search", low=1)
    seed: int = knob(0, "seed of the search and of its noises", low=0)

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        check_grid(pipe.scheduler, self.name)

    # -- use ---------------------------------------------------------------------------------------
    def bind(self, model: torch.nn.Module, parts: Parts) -> Genome:
        """The list that was found."""
        return tuple(parts["timesteps"].double().tolist())

    def begin(self, run: Run, bound: Genome) -> Genome:
        """See `DenoiseTechnique.begin`."""
        return bound

    def ask(self, state: Genome, run: Run, arguments: dict[str, Any]) -> None:
        """Ask for as many steps as the list has."""
        for name in ("timesteps", "sigmas"):
            if arguments.get(name) is not None:
                raise HastenError(f"{self.name} brings its own {name}; leave that argument out.")
        known = inspect.signature(type(run.pipe).__call__).parameters
        asked = arguments.get(COUNT) or known[COUNT].default
        if int(asked) > len(state):
            run.activity[f"{self.name}.left_out"] += int(asked) - len(state)
        arguments[COUNT] = len(state)

    def plan(self, state: Genome, run: Run) -> None:
        """Give the scheduler the list."""
        own = times(run.scheduler)
        set_grid(run, state)
        if list(state) != own:
            run.activity[f"{self.name}.steps_moved"] += sum(t not in own for t in state)

    # -- the search --------------------------------------------------------------------------------
    def prepare(self, preparation: Any) -> Parts:
        """Search for a list: "timesteps" (steps,), "curve" of the best fitness, "uniform" one's.

        `preparation.arguments` may hold "features", a function of pictures, and "real", pictures or
        their features, beside arguments of the pipeline's call.
        """
        self.check(preparation.subject.pipe)
        judge = Fitness.of(self, preparation)
        uniform = judge.uniform()
        scheduler = preparation.subject.pipe.scheduler
        evolution = Evolution(
            judge,
            training_steps(scheduler),
            1 if is_flow(scheduler) else 0,
            torch.Generator().manual_seed(self.seed),
        )
        generations = self.generations if preparation.steps is None else preparation.steps
        total = generations + 1
        for number in range(total):
            if self.search == "random":
                lists = [uniform] * (number == 0)
                lists += [evolution.random(self.steps) for _ in range(self.population - len(lists))]
            elif number == 0:
                lists = evolution.first(uniform, self.population)
            else:
                lists = evolution.next(self.population, max(2, round(PARENTS * self.population)))
            evolution.look(lists)
            preparation.tick(number + 1, total, f"distance {evolution.curve[-1]:.4g}")
        return {
            "timesteps": torch.tensor(evolution.best, dtype=torch.float64),
            "curve": torch.tensor(evolution.curve, dtype=torch.float64),
            "uniform": torch.tensor(evolution.found[uniform], dtype=torch.float64),
        }


@dataclass
class Fitness:
    """What a list of timesteps is worth on a pipeline.

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
    def of(cls, technique: AutoDiffusion, preparation: Any) -> Fitness:
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

    def _reference(self, preparation: Any, real: Any) -> Tensor:
        if real is not None:
            return real if real.ndim == 2 else self.features(real)
        if preparation.subject.name.startswith("scenes-"):
            from hasten.zoo.scenes.caption import prompts
            from hasten.zoo.scenes.render import render

            size = self.draw(None)[:1].shape[-1]
            scenes = [scene for _, scene in prompts(self.technique.samples, preparation.seed)]
            return self.features(render(scenes, size))
        return self.features(self.draw(None, steps=REFERENCE_STEPS))

    def uniform(self) -> Genome:
        """The scheduler's own list."""
        self._call(self.arguments[0], 0, None, self.technique.steps)
        return tuple(times(self.pipe.scheduler))

    def __call__(self, genome: Genome) -> float:
        return frechet(self.features(self.draw(genome)), self.real)

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
        run = Run(self.pipe, Slots())
        if genome is not None:
            run = Run(self.pipe, Slots(schedule=(self.technique, genome)))
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


def frechet(first: Tensor, second: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, (n, dim) each.

    Covariances are shrunk a little towards a ball, which few samples need.
    """
    means, roots = [], []
    for values in (first.double(), second.double()):
        means.append(values.mean(dim=0))
        covariance = torch.cov(values.T).reshape(values.shape[1], values.shape[1])
        ball = torch.eye(len(covariance), dtype=torch.float64) * covariance.diagonal().mean()
        roots.append((1 - SHRINK) * covariance + SHRINK * ball)
    apart = (means[0] - means[1]).square().sum()
    root = _root(roots[0])
    between = _root(root @ roots[1] @ root)
    return float(apart + (roots[0] + roots[1] - 2 * between).diagonal().sum())


def _root(matrix: Tensor) -> Tensor:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
