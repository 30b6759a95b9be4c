"""Running tiny pipelines with a plan, and looking inside them, for the tests of denoise techniques."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hasten
from hasten.denoise.blocks import blocks
from hasten.denoise.inputs import SIZES
from hasten.denoise.network import networks
from hasten.subject import Subject, open_subject
from hasten.technique import Parts
from hasten.zoo import catalogue
from hasten.zoo.scenes import prompts
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


@cache
def zoo(name: str) -> Subject:
    """A trained model of the zoo; skips the test while it is not there."""
    if not catalogue.is_zoo_name(name):
        pytest.skip(f"{name} is not in the zoo's folder ({catalogue.SHIPPED})")
    return open_subject(name)


def zoo_sample(
    name: str,
    *plan: str,
    steps: int = 20,
    count: int = 4,
    seed: int = 0,
    parts: dict[str, Parts] | None = None,
) -> tuple[Tensor, dict[str, int]]:
    """(count, ...) pictures of held-out captions by a trained model, and what a plan counted."""
    pipe = zoo(name)
    size = {key: value for key, value in catalogue.card(name)["sampling"].items() if key in SIZES}
    captions = [words for words, _ in prompts(count, seed, frames=size.get("num_frames", 1))]
    with hasten.apply(pipe, *plan, parts=parts) as fast:
        made = fast(
            prompt=captions,
            **size,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            return_dict=False,
        )
        return torch.as_tensor(made[0]), dict(fast.activity)


def db(ours: Tensor, original: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures from 0 to 1, in decibels."""
    error = (ours.double() - original.double()).square().flatten(1).mean(dim=1)
    return float((-10.0 * torch.log10(error + 1e-20)).mean())
