"""TaylorSeer as Diffusers ships it: a baseline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hasten.denoise.blocks import is_attention
from hasten.denoise.gate.diffusers_caches import (
    CONTRACT,
    DiffusersCache,
    Watch,
    cache_card,
    of_diffusers,
)
from hasten.technique import Card, Contract, Parts, knob, technique


@technique("taylorseer_cache")
@dataclass(frozen=True, kw_only=True)
class TaylorSeerCache(DiffusersCache):
    """Follows the outputs of attention and feed-forward layers by Taylor's series."""

    card: ClassVar[Card] = cache_card(
        "TaylorSeer",
        "https://arxiv.org/abs/2503.06923",
        {"interval": 1},
        notes="Put on every attention and feed-forward layer, as in the paper.",
    )
    contract: ClassVar[Contract] = CONTRACT

    interval: int = knob(5, "steps to each one that computes; more save more", low=1)
    order: int = knob(1, "terms of the series beside the first", low=0, high=4)
    warmup: int = knob(3, "steps at the start that all compute", low=1)

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """See `DiffusersCache.put_on`."""
        layers = [name for name, module in network.named_modules() if _is_layer(module)]
        config = of_diffusers("TaylorSeerCacheConfig")(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=next(network.parameters()).dtype,
            cache_identifiers=[re.escape(name) for name in layers] or ["-"],
        )
        of_diffusers("apply_taylorseer_cache")(network, config)


def _is_layer(module: nn.Module) -> bool:
    return is_attention(module) or type(module).__name__.endswith(("FeedForward", "Mlp", "MLP"))
