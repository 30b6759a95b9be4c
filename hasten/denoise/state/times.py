"""What a network is told of the time, for timesteps that the pipeline's loop does not walk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hasten.denoise.schedule.grid import training_steps
from hasten.errors import SubjectError

MARK = 0.7  # of the training steps: where the ways in which networks are told the time differ
NEAR = 0.02

_WAYS: tuple[Callable[[Any, int], Any], ...] = (
    lambda t, count: t,
    lambda t, count: t / count,
    lambda t, count: 1 - t / count,
    lambda t, count: count - t,
)


class EndlessLoop:
    """A scheduler's list of timesteps made as long as wanted, and put back afterwards.

    All entries are the same marked timestep: what the network is really told, the technique says.
    """

    def __init__(self, scheduler: Any, length: int, who: str) -> None:
        self.who = who  # the technique that errors speak of
        self.scheduler = scheduler
        names = ("timesteps", "sigmas", "num_inference_steps", "_step_index", "_begin_index")
        self.before = {name: getattr(scheduler, name) for name in names if hasattr(scheduler, name)}
        self.mark = MARK * training_steps(scheduler)
        times = scheduler.timesteps
        scheduler.timesteps = torch.full((length,), self.mark, dtype=times.dtype).to(times.device)
        self.mark = float(scheduler.timesteps[0])
        if torch.is_tensor(self.before.get("sigmas")):  # some pipelines look a level up
            sigmas = self.before["sigmas"]
            scheduler.sigmas = torch.full((length + 1,), MARK, dtype=sigmas.dtype).to(sigmas.device)
        if hasattr(scheduler, "_begin_index"):
            scheduler._begin_index, scheduler._step_index = 0, 0

    def restore(self) -> None:
        """Put the scheduler's own list back."""
        for name, value in self.before.items():
            setattr(self.scheduler, name, value)

    def told(self, given: Any, times: Tensor) -> Tensor:
        """What the network is told for these timesteps.

        Args:
            given: what the pipeline tells it for the marked one.
            times: (rows,) timesteps of the scheduler.

        Raises:
            SubjectError: where the pipeline tells the time in a way that is not known here.
        """
        value = torch.as_tensor(given)
        count, found = training_steps(self.scheduler), float(value.reshape(-1)[0])
        for way in _WAYS:
            expected = way(self.mark, count)
            if abs(found - expected) <= NEAR * abs(expected):
                told = way(times.double(), count)
                return told.to(value.device, value.dtype)
        raise SubjectError(
            f"{self.who}: a network that is told {found:g} for timestep {self.mark:g} of {count} is told the time in a way that "
            "hasten does not know."
        )
