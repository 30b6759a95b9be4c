"""The searches of one call of a pipeline, one for each sample, and the winners' way to the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hasten.denoise.coding import Coder
from hasten.denoise.state.interpolants import Place
from hasten.denoise.state.rewards import Reward
from hasten.denoise.state.search import Particle, Search
from hasten.denoise.state.sizes import fresh
from hasten.denoise.state.times import EndlessLoop
from hasten.errors import HastenError


@dataclass
class Progress:
    """One call.

    Attributes:
        reward: what is raised; `prompts`: one for each sample.
        until: evaluations that the searches spend; those behind walk the winners on.
        generator: what noise is drawn with.
        loop: the scheduler's list, made as long as the budget.
        grid: the path's times; `after`: the flow's times after the search.
        times: the scheduler's timestep of each of them, one list after the other.
        coder: decodes estimates for the reward.
        searches: one for each sample.
        end: (samples, ...) the samples that are walked on after the search.
    """

    reward: Reward
    until: int
    prompts: list[str] = field(default_factory=list)
    generator: Any = None
    loop: EndlessLoop | None = None
    grid: list[Place] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    coder: Coder | None = None
    searches: list[Search] = field(default_factory=list)
    end: Tensor | None = None

    def given(self, evaluation: int) -> tuple[Tensor, Tensor]:
        """(samples, ...) what the network is given next, and (samples,) the timesteps of it."""
        if self.end is not None:
            places = [len(self.grid) + evaluation - self.until] * len(self.searches)
            x = self.end
        else:
            places = [search.place for search in self.searches]
            x = torch.stack([s.candidate / self.grid[s.place].c for s in self.searches])
        return x, torch.tensor([self.times[place] for place in places], dtype=torch.float64)

    def judge(self, flow: Tensor, dtype: torch.dtype) -> Tensor:
        """Tell each search what its candidate is worth.

        Args:
            flow: (samples, ...) the network's velocities.
            dtype: of the latents that are decoded.

        Returns:
            (samples, ...) the candidates' clean estimates.

        Raises:
            HastenError: where the reward has not one value for each picture.
        """
        assert self.coder is not None
        found = []
        for search, velocity in zip(self.searches, flow, strict=True):
            place = self.grid[search.place]
            velocity = velocity.reshape(search.candidate.shape)
            clean = search.candidate / place.c - place.t * velocity
            found.append(Particle(search.candidate, velocity, clean, 0.0))
        cleans = torch.stack([particle.clean for particle in found])
        pictures = self.coder.decode(cleans.to(dtype))
        rewards = torch.as_tensor(self.reward(pictures, self.prompts)).double().flatten()
        if len(rewards) != len(found):
            raise HastenError(
                f"The reward gave {len(rewards)} values for {len(found)} pictures; it must give one for each."
            )
        noise = fresh(torch.stack([s.candidate for s in self.searches]), self.generator)
        for search, particle, reward, drawn in zip(
            self.searches, found, rewards.tolist(), noise, strict=True
        ):
            particle.reward = reward
            search.take(particle, drawn)
        return cleans

    def winners(self) -> Tensor:
        """(samples, ...) what the searches found: at the first time of the walk, or clean without one."""
        found = [s.winner for s in self.searches if s.winner is not None]
        if not self.after:
            return torch.stack([winner.clean for winner in found])
        last, first = self.grid[-1], self.after[0]
        self.end = torch.stack([w.x / last.c + (first - last.t) * w.flow for w in found])
        return self.end

    def walk(self, flow: Tensor, evaluation: int) -> Tensor:
        """(samples, ...) the winners one step of the flow further on."""
        assert self.end is not None
        times, index = [*self.after, 0.0], evaluation - self.until
        self.end = self.end + (times[index + 1] - times[index]) * flow.reshape(self.end.shape)
        return self.end
