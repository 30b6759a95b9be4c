"""SeaCache as Diffusers ships it: a baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from hasten.denoise.gate.diffusers_caches import (
    CONTRACT,
    DiffusersCache,
    Watch,
    cache_card,
    check_text,
    of_diffusers,
)
from hasten.denoise.network import Call
from hasten.technique import Card, Contract, Parts, knob, technique


@technique("sea_cache")
@dataclass(frozen=True, kw_only=True)
class SeaCache(DiffusersCache):
    """Skips all blocks while the sample, filtered as its noise level asks for, changes little."""

    card: ClassVar[Card] = cache_card(
        "SeaCache",
        "https://arxiv.org/abs/2602.18993",
        {"threshold": 0.0},
        notes="Does nothing where the network's input is already cut into tokens.",
    )
    contract: ClassVar[Contract] = replace(CONTRACT, runners=frozenset({"eager", "compiled"}))

    threshold: float = knob(
        0.25, "summed relative change up to which blocks are skipped; higher skips more", low=0.0
    )
    order: int = knob(1, "follow the last two residuals (1) or use the last one (0)", low=0, high=1)
    max_skips: int = knob(2, "steps in a row that may be skipped", low=1)

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """See `DiffusersCache.put_on`."""
        check_text(network)
        config = of_diffusers("SeaCacheConfig")(
            threshold=self.threshold,
            residual_order=self.order,
            max_consecutive_cached=self.max_skips,
            raw_vision_callback=_clips,
        )
        of_diffusers("apply_sea_cache")(network, config)


def _clips(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """(channels, frames, height, width) each sample that a network is given; None for tokens."""
    x = Call(module, args, kwargs).x
    if x.ndim == 4:
        return list(x[:, :, None].unbind())
    if x.ndim != 5:
        return None
    channels = module.config.in_channels  # type: ignore[union-attr]
    return list((x if x.shape[1] == channels else x.transpose(1, 2)).unbind())
