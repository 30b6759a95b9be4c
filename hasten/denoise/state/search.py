"""The search for one sample: chains of stochastic steps, each with a quota of evaluations.

It is told what each candidate is worth and chooses the next one; it calls no network. After
"Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing"
(arXiv 2503.19385).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from hasten.denoise.state.interpolants import Place


@dataclass
class Particle:
    """A sample of the path at one of its times, with what the network said of it.

    Attributes:
        x, flow: (...) the sample, and the flow's velocity there.
        clean: (...) the clean estimate; `reward`: what it is worth.
    """

    x: Tensor
    flow: Tensor
    clean: Tensor
    reward: float


@dataclass(frozen=True)
class Rule:
    """How a search goes on.

    Attributes:
        grid: the path's times, from noise on.
        draws: start noises of a chain.
        quota: evaluations of a step without what was handed on.
        diffusion: strength of new noise, times s squared.
        rollover: a child that beats all before is taken at once, and the rest of the quota handed on.
    """

    grid: list[Place]
    draws: int
    quota: int
    diffusion: float
    rollover: bool


@dataclass
class Search:
    """A search in progress.

    Attributes:
        shares: evaluations of each chain.
        candidate: (...) what the network is given next.
        place: index of the time at which it stands.
        chain: the chain in hand; `used`: its evaluations so far; `drawn`: its start noises.
        parent: where the step in hand begins; None while start noises are drawn.
        child: the best of the step in hand.
        best: the best reward of the chain so far.
        room, spent: quota of the step in hand, and evaluations in it.
        winner: the best of the last steps of all chains.
        ledger: (quota, evaluations) of each step that was made.
    """

    rule: Rule
    shares: list[int]
    candidate: Tensor
    place: int = 0
    chain: int = 0
    used: int = 0
    drawn: int = 0
    parent: Particle | None = None
    child: Particle | None = None
    best: float = -math.inf
    room: int = 0
    spent: int = 0
    winner: Particle | None = None
    ledger: list[tuple[int, int]] = field(default_factory=list)

    @property
    def rolled_over(self) -> int:
        """Evaluations that steps handed on so far."""
        return sum(max(0, room - self.rule.quota) for room, _ in self.ledger)

    def take(self, seen: Particle, noise: Tensor) -> None:
        """Take in what the candidate is worth, and choose the next one.

        Args:
            noise: (...) new Gaussian noise.
        """
        self.used += 1
        if self.parent is None:
            self.drawn += 1
            if self.child is None or seen.reward > self.best:
                self.best, self.child = seen.reward, seen
            if self.drawn < self.rule.draws:
                self.candidate = noise
                return
            self._begin_step(self.child, self.rule.quota)
        else:
            self._take_child(seen)
        if self.used == self.shares[self.chain]:
            self._end_chain()
            self.candidate = noise
        else:
            self.candidate = self._step(noise)

    def _take_child(self, seen: Particle) -> None:
        self.spent += 1
        if self.child is None or seen.reward > self.child.reward:
            self.child = seen
        better = seen.reward > self.best
        self.best = max(self.best, seen.reward)
        if self.place == len(self.rule.grid) - 1:
            return  # the last time: what is left is spent here
        if better and self.rule.rollover:
            self._end_step(seen, self.rule.quota + self.room - self.spent)
        elif self.spent == self.room:
            self._end_step(self.child, self.rule.quota)

    def _step(self, noise: Tensor) -> Tensor:
        """A child of the parent."""
        assert self.parent is not None
        here, there = self.rule.grid[self.place - 1], self.rule.grid[self.place]
        strength = self.rule.diffusion * here.s**2
        return here.step(self.parent.x, self.parent.flow, here.s - there.s, strength, noise)

    def _begin_step(self, parent: Particle, room: int) -> None:
        self.parent, self.child = parent, None
        self.room, self.spent = room, 0
        self.place += 1

    def _end_step(self, chosen: Particle, room: int) -> None:
        self.ledger.append((self.room, self.spent))
        self._begin_step(chosen, room)

    def _end_chain(self) -> None:
        self.ledger.append((self.room, self.spent))
        last = self.child or self.parent
        assert last is not None
        if self.winner is None or last.reward > self.winner.reward:
            self.winner = last
        self.chain += 1
        self.used = self.drawn = self.place = 0
        self.parent, self.child, self.best = None, None, -math.inf
