"""An evolutionary search over lists of timesteps; what a list is worth, a function says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

Genome = tuple[float, ...]
"""Distinct timesteps, falling."""

MUTATION = 0.1  # chance by which each entry is replaced
TRIES = 10  # so many times as many attempts as lists are wanted


@dataclass
class Evolution:
    """A search in progress.

    Attributes:
        fitness: what a list is worth; lower is better. Asked once for each list.
        limit: timesteps are whole numbers below this, shifted by `offset`.
        found: all lists that were looked at, with their fitness.
        curve: the best fitness so far, after each generation.
    """

    fitness: Callable[[Genome], float]
    limit: int
    offset: int
    generator: torch.Generator
    found: dict[Genome, float] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)

    @property
    def best(self) -> Genome:
        """The best list so far; the one seen first where several are as good."""
        return min(self.found, key=lambda genome: self.found[genome])

    def look(self, genomes: Iterable[Genome]) -> None:
        """Judge lists, and note the best of all so far."""
        for genome in genomes:
            if genome not in self.found:
                self.found[genome] = self.fitness(genome)
        self.curve.append(self.found[self.best])

    # -- generations -------------------------------------------------------------------------------
    def first(self, uniform: Genome, count: int) -> list[Genome]:
        """The first generation: the uniform list, random ones, and mutants of the uniform one."""
        made = [uniform]
        made += self._fresh(lambda: self.random(len(uniform)), (count - 1) // 2, made)
        made += self._fresh(lambda: self.mutant(uniform), count - len(made), made)
        return self._filled(made, count, len(uniform))

    def next(self, count: int, parents: int) -> list[Genome]:
        """A later generation: mutants and crossings of the best of everything seen."""
        ranked = sorted(self.found, key=lambda genome: self.found[genome])[:parents]
        made: list[Genome] = []
        made += self._fresh(lambda: self.mutant(self._one_of(ranked)), count // 2, made)
        made += self._fresh(
            lambda: self.crossing(self._one_of(ranked), self._one_of(ranked)),
            count - count // 2,
            made,
        )
        return self._filled(made, count, len(ranked[0]))

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
        return _falling(float(t) + self.offset for t in order.tolist())

    def mutant(self, genome: Genome) -> Genome | None:
        """A list with some entries replaced by unused timesteps; None where nothing changed."""
        swapped = torch.rand(len(genome), generator=self.generator) < MUTATION
        entries = [t for t, out in zip(genome, swapped.tolist(), strict=True) if not out]
        while len(entries) < len(genome):
            new = float(torch.randint(self.limit, (), generator=self.generator)) + self.offset
            if new not in entries:
                entries.append(new)
        made = _falling(entries)
        return made if made != genome else None

    def crossing(self, first: Genome, second: Genome) -> Genome | None:
        """Each entry from one of two lists; None where the result is no falling list."""
        picks = (torch.rand(len(first), generator=self.generator) < 0.5).tolist()
        made = tuple(a if pick else b for a, b, pick in zip(first, second, picks, strict=True))
        return made if all(a > b for a, b in itertools.pairwise(made)) else None

    def _one_of(self, genomes: list[Genome]) -> Genome:
        return genomes[int(torch.randint(len(genomes), (), generator=self.generator))]


def _falling(entries: Iterable[float]) -> Genome:
    return tuple(sorted(entries, reverse=True))
