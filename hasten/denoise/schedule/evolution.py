"""An evolutionary search over lists of steps; what a list is worth, a function says.

A step is a timestep and, where a budget asks for it, the layers that are left out at it. All lists of
a search leave out as many pairs of a step and a layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

MUTATION = 0.1  # chance by which each timestep, and each left out layer, is replaced
TRIES = 10  # so many times as many attempts as lists are wanted


class Gene(NamedTuple):
    """One step: its timestep, and the numbers of the layers that do not run at it."""

    time: float
    left_out: frozenset[int] = frozenset()


Genome = tuple[Gene, ...]
"""Steps whose timesteps are distinct and fall."""


def full(times: Iterable[float]) -> Genome:
    """A list of timesteps at which all layers run."""
    return tuple(Gene(float(time)) for time in times)


def count_left_out(genome: Genome) -> int:
    """Pairs of a step and a layer that do not run."""
    return sum(len(gene.left_out) for gene in genome)


@dataclass
class Evolution:
    """A search in progress.

    Attributes:
        fitness: what a list is worth; lower is better. Asked once for each list.
        limit: timesteps are whole numbers below this, shifted by `offset`.
        num_layers: that may be left out at each step.
        num_left_out: pairs of a step and a layer that each list leaves out.
        found: all lists that were looked at, with their fitness.
        curve: the best fitness so far, after each generation.
    """

    fitness: Callable[[Genome], float]
    limit: int
    offset: int
    generator: torch.Generator
    num_layers: int = 0
    num_left_out: int = 0
    found: dict[Genome, float] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)

    @property
    def best(self) -> Genome:
        """The best list so far; the one seen first where several are as good."""
        return self.ranked(1)[0]

    def ranked(self, count: int) -> list[Genome]:
        """The best lists so far, best first."""
        return sorted(self.found, key=lambda genome: self.found[genome])[:count]

    def look(self, genomes: Iterable[Genome]) -> None:
        """Judge lists, and note the best of all so far."""
        for genome in genomes:
            if genome not in self.found:
                self.found[genome] = self.fitness(genome)
        self.curve.append(self.found[self.best])

    # -- generations -------------------------------------------------------------------------------
    def first(self, uniform: Genome, count: int) -> list[Genome]:
        """The first generation: the uniform list, random ones, and mutants of the uniform one."""
        made = [self.fitted(uniform)]
        made += self._fresh(lambda: self.random(len(uniform)), (count - 1) // 2, made)
        made += self._fresh(lambda: self.mutant(uniform), count - len(made), made)
        return self._filled(made, count, len(uniform))

    def next(self, count: int, parents: list[Genome]) -> list[Genome]:
        """A later generation: mutants and crossings of lists, such as the best of all so far.

        They may come from another search, which left out fewer layers or none.
        """
        made: list[Genome] = []
        made += self._fresh(lambda: self.mutant(self._one_of(parents)), count // 2, made)
        made += self._fresh(
            lambda: self.crossing(self._one_of(parents), self._one_of(parents)),
            count - count // 2,
            made,
        )
        return self._filled(made, count, len(parents[0]))

    def _fresh(
        self, make: Callable[[], Genome | None], count: int, others: list[Genome]
    ) -> list[Genome]:
        """Up to `count` legal lists that were never looked at."""
        made: list[Genome] = []
        for _ in range(TRIES * max(0, count)):
            if len(made) >= count:
                break
            genome = make()
            if genome and genome not in self.found and genome not in made + others:
                made.append(genome)
        return made

    def _filled(self, made: list[Genome], count: int, length: int) -> list[Genome]:
        return made + self._fresh(lambda: self.random(length), count - len(made), made)

    # -- lists -------------------------------------------------------------------------------------
    def random(self, length: int) -> Genome:
        """A list by chance."""
        order = torch.randperm(self.limit, generator=self.generator)[:length]
        return self.fitted(_falling(Gene(float(t) + self.offset) for t in order.tolist()))

    def mutant(self, genome: Genome) -> Genome | None:
        """A list with some timesteps and left out layers replaced by others; None if by none."""
        swapped = torch.rand(len(genome), generator=self.generator) < MUTATION
        taken = {gene.time for gene, out in zip(genome, swapped.tolist(), strict=True) if not out}
        genes = []
        for gene, out in zip(genome, swapped.tolist(), strict=True):
            time = self._unused(taken) if out else gene.time
            taken.add(time)
            genes.append(Gene(time, self._thinned(gene.left_out)))
        made = self.fitted(_falling(genes))
        return made if made != genome else None

    def crossing(self, first: Genome, second: Genome) -> Genome | None:
        """Each step from one of two lists; None where the result does not fall."""
        picks = (torch.rand(len(first), generator=self.generator) < 0.5).tolist()
        made = tuple(a if pick else b for a, b, pick in zip(first, second, picks, strict=True))
        if not all(a.time > b.time for a, b in itertools.pairwise(made)):
            return None
        return self.fitted(made)

    def fitted(self, genome: Genome) -> Genome:
        """The list with as many layers left out as the budget asks for; which, chance says."""
        missing = self.num_left_out - count_left_out(genome)
        if missing == 0:
            return genome
        pairs = [
            (step, layer)
            for step, gene in enumerate(genome)
            for layer in range(self.num_layers)
            if (layer in gene.left_out) == (missing < 0)
        ]
        order = torch.randperm(len(pairs), generator=self.generator).tolist()
        turned = {pairs[i] for i in order[: abs(missing)]}
        return tuple(
            Gene(gene.time, gene.left_out ^ {layer for at, layer in turned if at == step})
            for step, gene in enumerate(genome)
        )

    def _unused(self, taken: set[float]) -> float:
        while True:
            time = float(torch.randint(self.limit, (), generator=self.generator)) + self.offset
            if time not in taken:
                return time

    def _thinned(self, left_out: frozenset[int]) -> frozenset[int]:
        """Without some, for which others are left out then."""
        if not left_out:
            return left_out
        stays = torch.rand(len(left_out), generator=self.generator) >= MUTATION
        return frozenset(itertools.compress(sorted(left_out), stays.tolist()))

    def _one_of(self, genomes: list[Genome]) -> Genome:
        return genomes[int(torch.randint(len(genomes), (), generator=self.generator))]


def _falling(genes: Iterable[Gene]) -> Genome:
    return tuple(sorted(genes, key=lambda gene: gene.time, reverse=True))
