"""MagCache as Diffusers ships it: a baseline, with ratios measured on the pipeline at hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from hasten.denoise.gate.diffusers_caches import (
    CONTRACT,
    NAME,
    DiffusersCache,
    Watch,
    cache_card,
    look_again,
    of_diffusers,
    worn,
)
from hasten.denoise.inputs import call_arguments
from hasten.denoise.network import Call, hooked, networks
from hasten.denoise.run import Run, Slots
from hasten.errors import SubjectError
from hasten.preparation import Preparation
from hasten.technique import Card, Contract, Parts, knob, technique

PROMPTS = 4
"""From so many prompts the ratios are measured, by default."""


@technique("mag_cache")
@dataclass(frozen=True, kw_only=True)
class MagCache(DiffusersCache):
    """Skips all blocks while measured ratios of their residuals' sizes promise little change."""

    card: ClassVar[Card] = cache_card(
        "MagCache", "https://github.com/Zehong-Ma/MagCache", {"max_skips": 0}, trained=True
    )
    contract: ClassVar[Contract] = replace(CONTRACT, runners=frozenset({"eager", "compiled"}))
    part_settings: ClassVar[tuple[str, ...]] = ("steps", "guidance", "size", "scheduler")

    threshold: float = knob(
        0.06, "summed expected change up to which blocks are skipped; higher skips more", low=0.0
    )
    max_skips: int = knob(3, "steps in a row that may be skipped", low=0)
    warmup: float = knob(0.2, "share of the steps at the start that all run", low=0.0, high=1.0)

    def example(self) -> Parts:
        return {"ratios": torch.ones(2)}

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """See `DiffusersCache.put_on`."""
        config = of_diffusers("MagCacheConfig")(
            threshold=self.threshold,
            max_skip_steps=self.max_skips,
            retention_ratio=self.warmup,
            num_inference_steps=len(parts["ratios"]),
            mag_ratios=parts["ratios"].tolist(),
        )
        config.measured = parts["ratios"]
        of_diffusers("apply_mag_cache")(network, config)

    def adjust(self, hook: Any, run: Run, call: Call) -> None:
        """Stretch the ratios over the steps of this call."""
        from diffusers.hooks.mag_cache import nearest_interp

        config = hook.config
        if config.num_inference_steps != run.num_steps:
            config.num_inference_steps = run.num_steps
            config.mag_ratios = nearest_interp(config.measured, run.num_steps)

    def check(self, pipe: Any) -> None:
        """See `DenoiseTechnique.check`."""
        if len(networks(pipe)) > 1:
            raise SubjectError(
                f"mag_cache counts the steps of one network, and {type(pipe).__name__} has two."
            )
        super().check(pipe)

    def prepare(self, preparation: Preparation) -> Parts:
        """Measure the ratios with Diffusers' own calibration, averaged over prompts and calls."""
        pipe = preparation.subject.pipe
        self.check(pipe)
        network, measured = networks(pipe)[0], []
        generator = torch.Generator().manual_seed(preparation.seed)
        prompts = preparation.draw(preparation.steps or PROMPTS, generator)
        for number, prompt in enumerate(prompts):
            run, calibration = Run(pipe, Slots()), _Calibration()
            with (
                run.attached(),
                worn(calibration, network, Watch(run), {}) as hooks,
                hooked(network, NAME, calibration.around(run, hooks)),
            ):
                look_again(network)
                arguments = call_arguments(pipe, [prompt], **preparation.arguments)
                pipe(**arguments, generator=generator)
            measured += [torch.tensor(ratios) for ratios in calibration.measured.values()]
            preparation.tick(number + 1, len(prompts), self.name)
        return {"ratios": torch.stack(measured).mean(dim=0)}


class _Calibration(DiffusersCache):
    """MagCache with nothing skipped, that measures.

    Attributes:
        measured: the ratios of each call of a step, one for each step.
    """

    name = "mag_cache"

    def __init__(self) -> None:
        self.measured: dict[int, list[float]] = {}

    def adjust(self, hook: Any, run: Run, call: Call) -> None:
        """Hold on to the lists that it fills, since pipelines make hooks forget at their end."""
        manager = getattr(hook, "state_manager", None)
        for state in manager._state_cache.values() if manager is not None else ():
            self.measured[id(state)] = state.calibration_ratios

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """See `DiffusersCache.put_on`."""
        config = of_diffusers("MagCacheConfig")(calibrate=True, num_inference_steps=1 << 30)
        of_diffusers("apply_mag_cache")(network, config)
