"""First Block Cache as Diffusers ships it: a baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from hasten.denoise.gate.diffusers_caches import (
    CONTRACT,
    DiffusersCache,
    Watch,
    cache_card,
    check_text,
    of_diffusers,
)
from hasten.technique import Card, Contract, Parts, knob, technique


@technique("first_block_cache")
@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(DiffusersCache):
    """Skips all blocks but the first while the first one's output changes little."""

    card: ClassVar[Card] = cache_card(
        "First Block Cache", "https://github.com/chengzeyi/ParaAttention", {"threshold": 0.0}
    )
    contract: ClassVar[Contract] = replace(CONTRACT, runners=frozenset({"eager", "compiled"}))

    threshold: float = knob(
        0.05, "relative change up to which blocks are skipped; higher skips more", low=0.0
    )

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """See `DiffusersCache.put_on`."""
        check_text(network)
        config = of_diffusers("FirstBlockCacheConfig")(threshold=self.threshold)
        of_diffusers("apply_first_block_cache")(network, config)
