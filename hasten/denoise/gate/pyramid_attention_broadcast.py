"""Pyramid Attention Broadcast as Diffusers ships it: a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hasten.denoise.gate.diffusers_caches import (
    CONTRACT,
    DiffusersCache,
    Watch,
    cache_card,
    of_diffusers,
)
from hasten.technique import Card, Contract, Parts, knob, technique


@technique("pyramid_attention_broadcast")
@dataclass(frozen=True, kw_only=True)
class PyramidAttentionBroadcast(DiffusersCache):
    """Uses the outputs of attention layers again in the middle of the way."""

    card: ClassVar[Card] = cache_card(
        "Pyramid Attention Broadcast", "https://arxiv.org/abs/2408.12588", {"interval": 1}
    )
    contract: ClassVar[Contract] = CONTRACT

    interval: int = knob(2, "steps to each one that computes attention; more save more", low=1)
    first: float = knob(800.0, "timestep from which it acts", low=0.0, high=1000.0)
    last: float = knob(100.0, "timestep to which it acts", low=0.0, high=1000.0)

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """See `DiffusersCache.put_on`."""
        kinds = ("spatial", "temporal", "cross")
        config = of_diffusers("PyramidAttentionBroadcastConfig")(
            **{f"{kind}_attention_block_skip_range": self.interval for kind in kinds},
            **{f"{kind}_attention_timestep_skip_range": (self.last, self.first) for kind in kinds},
            current_timestep_callback=lambda: watch.timestep,
        )
        of_diffusers("apply_pyramid_attention_broadcast")(network, config)
