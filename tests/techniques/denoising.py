"""Running tiny pipelines with a plan, and looking inside them, for the tests of denoise techniques."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hasten
from hasten.denoise.blocks import blocks
from hasten.denoise.network import networks
from hasten.technique import Parts
from tests.pipelines import call, picture


def made(
    pipe: Any, family: str, *plan: str, parts: dict[str, Parts] | None = None, **more: Any
) -> tuple[Tensor, dict[str, int]]:
    """A picture with a plan, or without one, and what the plan counted."""
    with hasten.apply(pipe, *plan, parts=parts) as fast:
        result = picture(fast(**call(family, **more)))
        return result, dict(fast.activity)


def own(activity: dict[str, int], name: str) -> dict[str, int]:
    """The counters of one technique."""
    return {key: value for key, value in activity.items() if key.startswith(f"{name}.")}


@dataclass
class Pass:
    """One forward pass of a module: copies of what it got and gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Recording:
    """All passes of some modules, in order."""

    passes: dict[int, list[Pass]] = field(default_factory=dict)

    def of(self, module: nn.Module) -> list[Pass]:
        """The passes of a module."""
        return self.passes.get(id(module), [])


@contextmanager
def recording(modules: list[nn.Module]) -> Iterator[Recording]:
    """Write down what modules get and give, whatever a plan does to them."""
    found = Recording()

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        one = Pass(*(_copy(value) for value in (args, kwargs, output)))
        found.passes.setdefault(id(module), []).append(one)

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _copy(entry) for key, entry in value.items()}
    return value


def block_list(pipe: Any) -> list[nn.Module]:
    """The transformer blocks of a pipeline's network."""
    return blocks(networks(pipe)[0])


@contextmanager
def with_forward(modules: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward(index, *args, **kwargs)` in the place of modules' own, for a while."""
    for index, module in enumerate(modules):
        module.forward = lambda *args, _i=index, **kwargs: forward(_i, *args, **kwargs)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def db(ours: Tensor, original: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures from 0 to 1, in decibels."""
    error = (ours.double() - original.double()).square().mean()
    return float(-10.0 * torch.log10(error + 1e-20))
