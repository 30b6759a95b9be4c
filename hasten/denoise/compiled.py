"""The compiled runner of pipelines: each transformer block, or a whole U-Net, as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from hasten.applied import check_runs_on
from hasten.denoise.blocks import blocks
from hasten.denoise.network import hooked, networks
from hasten.errors import PlanError
from hasten.plan import Plan

NAME = "hasten_compiled"
RUNNERS = ("eager", "compiled")
MAX_GRAPHS = 64  # sizes and rows, over all pipelines of a process
BACKEND: str | Callable[..., Any] = "inductor"  # of torch.compile; tests take a quicker one


def check_runner(name: str, plan: Plan) -> None:
    """Raise where there is no such runner, or a technique of the plan cannot run on it."""
    if name not in RUNNERS:
        raise PlanError(f"Unknown runner {name!r}; there are: {', '.join(RUNNERS)}.")
    check_runs_on(name, plan)


@contextmanager
def compiled(pipe: Any) -> Iterator[None]:
    """Run the pipeline's networks through `torch.compile`, for a while.

    The first call of each size compiles, which takes seconds to a minute; all blocks of a kind
    share one graph. A graph begins and ends at a block's edge, so what acts between blocks, or
    outside of the network, goes with it; what acts on layers or attention does not. Outputs differ
    from the eager ones in the last bits, because fused kernels round differently.
    """
    with ExitStack() as stack:
        for network in networks(pipe):
            for module in blocks(network) or [network]:
                stack.enter_context(hooked(module, NAME, _forward))
        yield


def _forward(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
    kind: Any = type(module)
    return _graph(kind, BACKEND)(module, *args, **kwargs)


@cache
def _graph(kind: Any, backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a class of modules, compiled once for all of them."""
    # Every size and number of rows is a graph of its own; torch's usual 8 would be used up.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    graph: Callable[..., Any] = torch.compile(kind.forward, dynamic=False, backend=backend)
    return graph
