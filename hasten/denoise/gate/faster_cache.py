"""FasterCache as Diffusers ships it: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hasten.denoise.gate.diffusers_caches import (
    CONTRACT,
    DiffusersCache,
    Watch,
    cache_card,
    hooks_of,
    of_diffusers,
)
from hasten.denoise.network import Call
from hasten.denoise.run import Run
from hasten.technique import Card, Contract, Parts, knob, technique


@technique("faster_cache")
@dataclass(frozen=True, kw_only=True)
class FasterCache(DiffusersCache):
    """Follows attention layers' outputs, and the unconditional branch by its frequencies."""

    card: ClassVar[Card] = cache_card(
        "FasterCache",
        "https://arxiv.org/abs/2410.19355",
        {"interval": 1, "guidance_interval": 1},
        notes=(
            "The unconditional branch is left out only where both are halves of one call on a "
            "picture or clip, the unconditional one first."
        ),
    )
    contract: ClassVar[Contract] = CONTRACT

    interval: int = knob(2, "steps to each one that computes attention; more save more", low=1)
    guidance_interval: int = knob(5, "steps to each one with both branches; more save more", low=1)
    first: float = knob(681.0, "timestep from which it acts", low=0.0, high=1000.0)

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """See `DiffusersCache.put_on`."""
        from diffusers.utils import logging

        config = of_diffusers("FasterCacheConfig")(
            spatial_attention_block_skip_range=self.interval,
            spatial_attention_timestep_skip_range=(-1, self.first),
            unconditional_batch_skip_range=self.guidance_interval,
            unconditional_batch_timestep_skip_range=(-1, min(self.first, 641)),
            attention_weight_callback=lambda module: 0.5,
            tensor_format="BCHW",
            current_timestep_callback=lambda: watch.timestep,
        )
        said = logging.get_verbosity()
        logging.set_verbosity_error()  # it says at every call that it is experimental
        try:
            of_diffusers("apply_faster_cache")(network, config)
        finally:
            logging.set_verbosity(said)
        if not any(
            "Block" in type(h).__name__ for m in network.modules() for h in hooks_of(m).values()
        ):
            raise ValueError("it has no attention layers that it knows")

    def adjust(self, hook: Any, run: Run, call: Call) -> None:
        """Tell it whether the call holds both branches, and in which order its axes are."""
        if run.index == 0 and hasattr(hook, "is_guidance_distilled"):
            hook.is_guidance_distilled = not _holds_both(call)
        if hasattr(hook, "tensor_format"):
            channels = call.module.config.in_channels  # type: ignore[union-attr]
            last = "BFCHW" if call.x.shape[1] != channels else "BCFHW"
            hook.tensor_format = "BCHW" if call.x.ndim == 4 else last
            hook.uncond_cond_input_kwargs_identifiers = [
                name
                for name, value in call.kwargs.items()
                if isinstance(value, Tensor) and value.ndim and value.shape[0] == call.rows
            ]


def _holds_both(call: Call) -> bool:
    """Whether a first call holds each sample twice; two samples are never equal by chance."""
    if call.rows % 2 or call.x.ndim not in (4, 5):
        return False
    return torch.equal(*call.x.chunk(2))
