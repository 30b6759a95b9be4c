"""Toy pipelines whose network is a formula, and records of what a plan does at each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import hasten
from hasten.denoise.run import Run, Step

Rule = Callable[[Tensor, float], Tensor]
SHAPE = (4, 8, 8)  # channels, height, width


class Formula(nn.Module):
    """A network: `rule(sample, timestep)`; it notes the timestep of each call."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.rule = rule
        self.seen: list[float] = []

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        self.seen.append(float(timestep))
        return self.rule(sample, float(timestep))


class ToyPipeline(diffusers.DiffusionPipeline):
    """The plainest loop there is; `grow_at` doubles the sample's size before that step."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        num_inference_steps: int = 50,
        batch: int = 1,
        generator: torch.Generator | None = None,
        skipped: int = 0,
        grow_at: int = -1,
    ) -> tuple[Tensor]:
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(batch, *SHAPE, generator=generator)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for index, t in enumerate(scheduler.timesteps[skipped:]):
            if index == grow_at:
                x = nn.functional.interpolate(x, scale_factor=2.0)
            scaled = scheduler.scale_model_input(x, t) if _scales(scheduler) else x
            x = scheduler.step(self.transformer(scaled, t), t, x, return_dict=False)[0]
        return (x,)


def _scales(scheduler: Any) -> bool:
    return hasattr(scheduler, "scale_model_input")


def flow(**settings: Any) -> Any:
    """A flow-matching Euler scheduler."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def ddim(**settings: Any) -> Any:
    """A DDIM scheduler without clipping."""
    return diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", **settings)


def dpm(**settings: Any) -> Any:
    """DPM-Solver++ 2M."""
    return diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing", **settings)


def toy(rule: Rule, scheduler: Any) -> ToyPipeline:
    """A pipeline whose network is a formula."""
    return ToyPipeline(Formula(rule), scheduler)


@dataclass
class Record:
    """One call: its last sample, what the solver was given at each step, and the run itself."""

    sample: Tensor
    run: Run
    states: list[Any] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        assert self.run.trace is not None
        return self.run.trace

    @property
    def ran(self) -> list[bool]:
        return [step.ran for step in self.steps]

    @property
    def calls(self) -> int:
        return self.run.activity["calls"]

    @property
    def longest(self) -> int:
        """The longest run of skipped steps."""
        best = count = 0
        for ran in self.ran:
            count = 0 if ran else count + 1
            best = max(best, count)
        return best


def record(pipe: Any, plan: str = "", *, seed: int = 0, **call: Any) -> Record:
    """Run a pipeline with a plan on it and note everything."""
    generator = torch.Generator().manual_seed(seed)
    with hasten.apply(pipe, plan) as fast:
        run = fast.start()
        run.trace = []
        made = fast._execute(run, generator=generator, **call)
    return Record(made[0], run, list(run.states.values()))


def gaussian(scheduler: Any, spread: float = 0.5) -> Rule:
    """The exact noise of data that is Gaussian with this spread, for a table of noise levels."""
    shares = scheduler.alphas_cumprod

    def rule(sample: Tensor, timestep: float) -> Tensor:
        share = float(shares[int(timestep)])
        return sample * (1 - share) ** 0.5 / (share * spread**2 + 1 - share)

    return rule


def mixture(num_centres: int = 5, spread: float = 0.3, kind: str = "flow") -> Rule:
    """The exact velocity, or noise, of data around a few centres: smooth, and far from linear.

    Args:
        kind: "flow" for the velocity at timestep 1000 s; or a scheduler whose table of noise
            levels says what a timestep is.
    """
    centres = 1.5 * torch.randn(num_centres, *SHAPE, generator=torch.Generator().manual_seed(7))

    def levels(timestep: float) -> tuple[float, float]:
        if isinstance(kind, str):
            return 1 - timestep / 1000, timestep / 1000
        share = float(kind.alphas_cumprod[int(timestep)])
        return share**0.5, (1 - share) ** 0.5

    def rule(sample: Tensor, timestep: float) -> Tensor:
        alpha, sigma = levels(timestep)
        variance = alpha**2 * spread**2 + sigma**2
        apart = sample[:, None] - alpha * centres
        weight = (-(apart**2).flatten(2).sum(-1) / (2 * variance)).softmax(-1)
        centre = (weight[..., None, None, None] * centres).sum(1)
        clean = centre + alpha * spread**2 / variance * (sample - alpha * centre)
        noise = (sample - alpha * clean) / max(sigma, 1e-4)
        return noise - clean if isinstance(kind, str) else noise

    return rule


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of samples whose values span about 6."""
    return float(10 * torch.log10(36.0 / (a - b).square().mean()))
