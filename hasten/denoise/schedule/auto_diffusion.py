"""AutoDiffusion: the timesteps of a short sampler are searched for, and the layers that run at each.

"AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion
Model Acceleration" (arXiv 2309.10438), after the reference code. `prepare` runs an evolutionary search
over lists of timesteps. A list is worth the Frechet distance between features of what it draws, from
the same noises each time, and features of reference pictures. The pipeline then walks the list with
its own solver, whose coefficients follow the uneven gaps. Below `layers=1` the first half of the
search is for timesteps with the whole network; the other half leaves layers out as well, so many over
all steps, and goes on with the best lists of the first. A layer that is left out adds nothing: in a
transformer these are whole blocks, in a U-Net residual and attention layers, of which the shortcut
stays where it changes the number of channels.

Ours: features come from the judge of scenes unless a function is given; reference pictures are real
scenes for the models of the zoo, and the pipeline's own at many steps for any other. The covariance
is shrunk, because few pictures are drawn. Every list leaves out exactly as much as the budget asks
for, at any step, where the code has a bound on the sum and one for each step. A mutation exchanges
left out layers for others, as the paper says; in the code it compares and assigns nothing.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from hasten.denoise.block.residual import through
from hasten.denoise.blocks import BlockCall
from hasten.denoise.blocks import layers as layers_of
from hasten.denoise.levels import is_flow
from hasten.denoise.network import networks
from hasten.denoise.run import Run
from hasten.denoise.schedule.evolution import Evolution, Gene, Genome, full
from hasten.denoise.schedule.fitness import Fitness
from hasten.denoise.schedule.grid import check_grid, set_grid, times, training_steps
from hasten.denoise.slots import Block, Schedule
from hasten.errors import HastenError, SubjectError
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

if TYPE_CHECKING:
    from hasten.preparation import Preparation

PARENTS = 0.2  # share of a generation from whose number of best lists new ones are made
COUNT = "num_inference_steps"


@technique("auto_diffusion")
@dataclass(frozen=True, kw_only=True)
class AutoDiffusion(Schedule, Block):
    """Walks a few timesteps that a search has found, each with the layers that it has chosen."""

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
            "and none of that is in any time that is reported. With few samples it fits their noises: on "
            "scenes-unet at 4 steps, a list found on 48 was 9 % better than a uniform one on them and 8 % "
            "worse on others; one found on 144, 14 % and 10 % better. It takes the place of the number of "
            "steps that a call asks for. To spend the work of so many whole steps on more of them, "
            "raise steps and lower layers by the same factor."
        ),
    )
    contract: ClassVar[Contract] = Contract(
        slots=(Slot.SCHEDULE,),
        changes=frozenset({Resource.TIMESTEPS}),
        runners=frozenset({"eager", "compiled"}),
    )
    part_knobs: ClassVar[tuple[str, ...]] = ("steps", "layers", "search", "seed")
    part_settings: ClassVar[tuple[str, ...]] = ("guidance", "size", "scheduler")

    steps: int = knob(
        4, "timesteps that are walked; fewer gain more from a search", low=1, high=100
    )
    layers: float = knob(
        1.0,
        "share of the pairs of a step and a layer that run; below 1 layers are searched for too",
        low=0.1,
        high=1.0,
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

    def terms(self) -> Contract:
        """Where layers are left out nothing else may act on blocks."""
        if self.layers == 1.0:
            return self.contract
        # A U-Net is compiled as a whole, and what runs in it would be the same at every step.
        return replace(
            self.contract, slots=(Slot.SCHEDULE, Slot.BLOCK), runners=frozenset({"eager"})
        )

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        check_grid(pipe.scheduler, self.name)
        network = networks(pipe)[0]
        if self.layers < 1.0 and not layers_of(network):
            raise SubjectError(
                f"{self.name} leaves out transformer blocks, or residual and attention layers of a U-Net, and "
                f"{type(network).__name__} has none; use layers=1."
            )

    # -- use ---------------------------------------------------------------------------------------
    def bind(self, model: torch.nn.Module, parts: Parts) -> Genome:
        """The list that was found."""
        found = full(parts["timesteps"].double().tolist())
        if "left_out" not in parts:
            return found
        rows = [frozenset(row.nonzero()[:, 0].tolist()) for row in parts["left_out"]]
        return tuple(Gene(gene.time, row) for gene, row in zip(found, rows, strict=True))

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
        own, wanted = times(run.scheduler), [gene.time for gene in state]
        set_grid(run, wanted)
        if wanted != own:
            run.activity[f"{self.name}.steps_moved"] += sum(t not in own for t in wanted)

    def block(self, state: Genome, run: Run, call: BlockCall) -> Any:
        """See `Block.block`."""
        if call.index not in state[run.first + run.index].left_out:
            return call.compute()
        run.activity[f"{self.name}.layers_left_out"] += 1
        return through(call)

    # -- the search --------------------------------------------------------------------------------
    def prepare(self, preparation: Preparation) -> Parts:
        """Search for a list: "timesteps" (steps,), and "curve", the best distance of each generation.

        With them come "uniform", the distance of the even list; and where layers are left out
        "left_out" (steps, layers) bool, and "steps_curve" of the search with the whole network.
        `preparation.arguments` may hold "features", a function of pictures, and "real", pictures or
        their features, beside arguments of the pipeline's call.
        """
        pipe = preparation.subject.pipe
        self.check(pipe)
        judge = Fitness.of(self, preparation)
        uniform = judge.uniform()
        known = {uniform: judge(uniform)}
        luck = torch.Generator().manual_seed(self.seed)
        evolution = self._evolution(judge, known, luck)
        generations = self.generations if preparation.steps is None else preparation.steps
        total = generations + 1
        curves, best = {}, list[Genome]()
        for number in range(total):
            if number == self._first_stage(total):
                if number:
                    curves["steps_curve"] = evolution.curve
                layers = len(layers_of(networks(pipe)[0]))
                evolution = self._evolution(judge, known, luck, layers)
            evolution.look(self._generation(evolution, best, uniform))
            best = evolution.ranked(max(2, round(PARENTS * self.population)))
            preparation.tick(number + 1, total, f"distance {evolution.curve[-1]:.4g}")
        curves["curve"] = evolution.curve
        return self._parts(best[0], evolution.num_layers) | {
            name: torch.tensor(values, dtype=torch.float64)
            for name, values in [*curves.items(), ("uniform", known[uniform])]
        }

    def _first_stage(self, total: int) -> int:
        """Generations that search for timesteps alone; search by chance makes nothing of them."""
        if self.layers == 1.0:
            return total
        return 0 if self.search == "random" else total // 2

    def _evolution(
        self,
        judge: Fitness,
        known: dict[Genome, float],
        luck: torch.Generator,
        num_layers: int = 0,
    ) -> Evolution:
        """A search that has not begun; with `num_layers` one that leaves layers out."""
        scheduler = judge.pipe.scheduler
        pairs = self.steps * num_layers
        return Evolution(
            lambda genome: known[genome] if genome in known else judge(genome),
            training_steps(scheduler),
            1 if is_flow(scheduler) else 0,
            luck,
            num_layers,
            pairs - round(self.layers * pairs),
        )

    def _generation(
        self, evolution: Evolution, best: list[Genome], uniform: Genome
    ) -> list[Genome]:
        """The next lists to judge."""
        if self.search == "random":
            lists = [] if best else [evolution.fitted(uniform)]
            missing = self.population - len(lists)
            return lists + [evolution.random(len(uniform)) for _ in range(missing)]
        if not best:
            return evolution.first(uniform, self.population)
        return evolution.next(self.population, best)

    def _parts(self, genome: Genome, num_layers: int) -> Parts:
        """A list as tensors."""
        parts = {"timesteps": torch.tensor([gene.time for gene in genome], dtype=torch.float64)}
        if self.layers < 1.0:
            left_out = torch.zeros(len(genome), num_layers, dtype=torch.bool)
            for row, gene in zip(left_out, genome, strict=True):
                row[sorted(gene.left_out)] = True
            parts["left_out"] = left_out
        return parts
