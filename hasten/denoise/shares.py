"""Which shares of a pipeline's time are its network, its blocks, its attention and its guidance."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hasten.denoise.blocks import AttentionCall, BlockCall
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.run import Run, Slots
from hasten.denoise.slots import Attention, Block, Guider
from hasten.plan import Plan
from hasten.technique import Card, Contract, Loss


@dataclass(frozen=True)
class Shares:
    """Shares of one call's time, each between 0 and 1; and its work.

    Attributes:
        calls: the network.
        guidance: the network's unconditional branch.
        blocks: transformer blocks; of a U-Net its residual and attention layers.
        attention: attention over the sample's own tokens, without its projections.
        flops: floating-point operations of the whole call.
        num_calls: network calls.
    """

    calls: float
    guidance: float
    blocks: float
    attention: float
    flops: float
    num_calls: int

    def of(self, term: str) -> float:
        """The share of a ceiling's term."""
        return {"tokens": self.calls}.get(term) or float(getattr(self, term))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


class _Watch:
    def __init__(self) -> None:
        self.blocks = self.attention = 0.0
        self.guided = False


class _Probe(Block, Attention, Guider):
    """Changes nothing; watches the clock."""

    card: ClassVar[Card] = Card(title="probe", family="", loss=Loss.EXACT)
    contract: ClassVar[Contract] = Contract(slots=())
    name: ClassVar[str] = "probe"

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def block(self, state: Any, run: Run, call: BlockCall) -> Any:
        start = time.perf_counter()
        output = call.compute()
        self.watch.blocks += time.perf_counter() - start
        return output

    def attend(self, state: Any, run: Run, call: AttentionCall) -> Tensor:
        start = time.perf_counter()
        output = call.dense()
        self.watch.attention += time.perf_counter() - start
        return output

    def wanted(self, state: Any, run: Run, call: Any) -> Tensor:
        self.watch.guided = True
        return torch.ones(1, dtype=torch.bool)


def count_flops(work: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products, convolutions and attention, eagerly run.

    A product of (m, k) and (k, n) counts 2 * m * k * n.
    """
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        work()
    return float(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of the shapes (batch, heads, length, head_dim) that the counter hands over."""
    flops: int = sdpa_flop_count(query, key, value)
    return flops


# The counter of torch knows the fused attention of GPUs only, and would count nothing for this one.
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _plain(model: DenoiseModel) -> DenoiseModel:
    """The same pipeline without a plan, run eagerly: a counter sees nothing inside a compiled graph."""
    return DenoiseModel(model.subject, Plan(()), exclusive=False)


def measure_shares(model: DenoiseModel, call: Callable[[DenoiseModel], Any]) -> Shares:
    """Measure one call of a pipeline with an empty plan.

    Three calls: one to time the network, one with clocks inside it, one to count operations.
    """
    call(model)
    network = model.network_seconds / model.seconds
    num_calls = int(model.activity["calls"])
    watch = _Watch()
    probe = _Probe(watch)
    slots = Slots(block=(probe, None), attention=(probe, None), guider=(probe, None))
    watched = _Watched(model, slots)
    call(watched)
    # Clocks cost time themselves, so the shares are of the network as it ran with them.
    inside = watched.network_seconds
    return Shares(
        calls=network,
        guidance=network / 2 if watch.guided else 0.0,
        blocks=network * watch.blocks / inside,
        attention=network * watch.attention / inside,
        flops=count_flops(lambda: call(_plain(model))),
        num_calls=num_calls,
    )


class _Watched(DenoiseModel):
    """The same pipeline with given slots."""

    def __init__(self, model: DenoiseModel, slots: Slots) -> None:
        super().__init__(model.subject, model.plan, exclusive=False)
        self._given = slots

    def _slots(self) -> Slots:
        return getattr(self, "_given", None) or super()._slots()
