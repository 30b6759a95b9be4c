"""TaylorSeer as Diffusers ships it: a baseline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from hasten.denoise.blocks import blocks, form, is_attention
from hasten.denoise.gate.diffusers_caches import (
    CONTRACT,
    DiffusersCache,
    Watch,
    cache_card,
    of_diffusers,
)
from hasten.technique import Card, Contract, Parts, knob, technique

_FEED_FORWARD = ("ff", "ff_context", "ff_a", "ff_b")
_LAST = ("proj_out", "proj_out_2", "final_layer", "conv_out")


@technique("taylorseer_cache")
@dataclass(frozen=True, kw_only=True)
class TaylorSeerCache(DiffusersCache):
    """Follows the outputs of attention and feed-forward layers by Taylor's series."""

    card: ClassVar[Card] = cache_card(
        "TaylorSeer",
        "https://arxiv.org/abs/2503.06923",
        {"interval": 1},
        notes=(
            "Put on attention and feed-forward layers, as in the paper; or, lite, on the last layer "
            "alone. A feed-forward layer that serves text and picture apart is computed always, since "
            "the hook takes its second use in a step for the next step."
        ),
    )
    contract: ClassVar[Contract] = CONTRACT

    interval: int = knob(5, "steps to each one that computes; more save more", low=1)
    order: int = knob(1, "terms of the series beside the first", low=0, high=4)
    lite: bool = knob(False, "follow the network's last layer, and compute nothing below it")
    warmup: int = knob(3, "steps at the start that all compute", low=1)

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """See `DiffusersCache.put_on`."""
        config = of_diffusers("TaylorSeerCacheConfig")(
            cache_interval=self.interval,
            disable_cache_before_step=self.warmup,
            max_order=self.order,
            taylor_factors_dtype=next(network.parameters()).dtype,
            **self._layers(network),
        )
        of_diffusers("apply_taylorseer_cache")(network, config)

    def _layers(self, network: nn.Module) -> dict[str, list[str]]:
        """Names of the layers that are followed, and of those that are left out meanwhile."""
        if not self.lite:
            found = [name for name, module in network.named_modules() if is_attention(module)]
            for name, module in network.named_modules():
                if "ff" in dict(module.named_children()) and not _shares(module):
                    found += [f"{name}.{ff}" for ff in _FEED_FORWARD if hasattr(module, ff)]
            return {"cache_identifiers": [re.escape(name) for name in found] or ["-"]}
        last = [name for name, _ in network.named_children() if name in _LAST][-1:]
        inside = {id(block) for block in blocks(network)}
        left = [name for name, module in network.named_modules() if id(module) in inside]
        if not last or not left:
            raise ValueError("it has no list of blocks with one last layer after it")
        return {
            "cache_identifiers": last,
            "skip_predict_identifiers": [re.escape(name) for name in left],
        }


def _shares(block: Any) -> bool:
    """Whether a block's feed-forward layer serves text and picture, one after the other."""
    apart = any(hasattr(block, name) for name in _FEED_FORWARD[1:])
    kind: Any = type(block)
    return form(kind).text is not None and not apart
