"""One call of a pipeline's network: its inputs by name, and its output as one tensor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hasten.errors import SubjectError

NETWORKS = ("transformer", "transformer_2", "unet")
"""Where pipelines keep what removes noise; video pipelines may have one for high and one for low noise."""


def networks(pipe: Any) -> list[nn.Module]:
    """The networks that remove noise in a pipeline.

    Raises:
        SubjectError: where there is none.
    """
    found = [getattr(pipe, name, None) for name in NETWORKS]
    modules = [module for module in found if isinstance(module, nn.Module)]
    if not modules:  # a prior or a decoder, which has the same loop
        modules = [part for part in vars(pipe).values() if _is_told_the_time(part)]
    if not modules:
        raise SubjectError(
            f"{type(pipe).__name__} has no {' or '.join(NETWORKS)}, so the denoise engine has no network to "
            "work on; it runs pipelines that denoise step by step."
        )
    return modules


TIMES = ("timestep", "timesteps", "t", "timestep_ratio", "vision_timesteps")
"""What networks call the time that they are told."""

PACKED = "vision_tokens"
"""What networks call the sample that do not take it first, but pack it with text and sound."""


def _is_told_the_time(part: Any) -> bool:
    kind: Any = type(part)
    return isinstance(part, nn.Module) and bool(set(parameters(kind)) & set(TIMES))


@cache
def parameters(kind: Any) -> tuple[str, ...]:
    """Names of what a network's class takes, in order."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


class Call:
    """The arguments of one forward pass, each by its name.

    Attributes:
        module: the network.
        kwargs: all arguments by name.
        branch: which of the step's calls this is: 0 for the first, and so on.
    """

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], branch: int = 0
    ) -> None:
        # Compiled as a whole, a network stands in a case that takes any arguments.
        kind: Any = type(getattr(module, "_orig_mod", module))
        names = parameters(kind)
        self.module = module
        self.kwargs: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        self.branch = branch
        # sample, hidden_states or x: the first, but where it is packed
        self._input = PACKED if PACKED in names else names[0]
        self._time = next((name for name in names if name in TIMES), "timestep")

    @property
    def x(self) -> Tensor:
        """The noisy sample, of any layout, rows first."""
        x = self.kwargs[self._input]
        return torch.stack(x) if isinstance(x, list) else x

    @x.setter
    def x(self, value: Tensor) -> None:
        listed = isinstance(self.kwargs[self._input], list)
        self.kwargs[self._input] = list(value.unbind(0)) if listed else value

    @property
    def timestep(self) -> Any:
        """What the network is told of the time: in its own scale, for all rows or for each."""
        return self.kwargs.get(self._time)

    @timestep.setter
    def timestep(self, value: Any) -> None:
        self.kwargs[self._time] = value

    @property
    def rows(self) -> int:
        """How many samples it holds, both branches of guidance counted."""
        return len(self.kwargs[self._input])

    @property
    def fills_cache(self) -> bool:
        """Whether it only fills the network's own cache, of frames that are done, and puts out nothing."""
        flags = self.kwargs.get("kv_cache_flag")
        return isinstance(flags, dict) and bool(flags.get("is_cache_step"))

    def take(self, rows: Tensor) -> Call:
        """The same call for some of its rows only: whatever has a row for each sample is cut."""
        kwargs = {
            name: value if _is_grid(name, value) else _cut(value, rows, self.rows)
            for name, value in self.kwargs.items()
        }
        for name, value in kwargs.items():
            if name.startswith("encoder") and _has_frames(value, self.rows):
                each = len(value) // self.rows
                kwargs[name] = value.unflatten(0, (-1, each))[rows].flatten(0, 1)
        return Call(self.module, (), kwargs, self.branch)


def _is_grid(name: str, value: Any) -> bool:
    """Arguments about places, whose first axis may happen to be as long as the batch."""
    if "rotary" in name:
        return True
    return name.endswith("_ids") and isinstance(value, Tensor) and value.ndim < 3


def _has_frames(value: Any, count: int) -> bool:
    """Whether a text is there once for each frame of each row."""
    return isinstance(value, Tensor) and len(value) > count and len(value) % count == 0


def _cut(value: Any, rows: Tensor, count: int) -> Any:
    if isinstance(value, Tensor):
        # A stack of layers of a text encoder has its rows on the second axis.
        axis = 1 if value.ndim > 3 and value.shape[0] != count == value.shape[1] else 0
        whole = value.ndim > 0 and value.shape[axis] == count
        return value.index_select(axis, rows.to(value.device)) if whole else value
    if isinstance(value, dict):
        return {key: _cut(entry, rows, count) for key, entry in value.items()}
    if isinstance(value, list) and len(value) == count:
        return [value[row] for row in rows.tolist()]
    if isinstance(value, (list, tuple)):
        return type(value)(_cut(entry, rows, count) for entry in value)
    return value


def unpack(output: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A network's output as a tensor with rows first, and how to give it back as it was."""
    if isinstance(output, tuple):
        tensor, pack = unpack(output[0])
        return tensor, lambda new: (pack(new), *output[1:])
    if isinstance(output, list):
        return torch.stack(output), lambda new: list(new.unbind(0))
    if isinstance(output, Tensor):
        return output, lambda new: new
    name = "sample" if "sample" in output else next(iter(output))  # a prior calls it otherwise
    tensor, pack = unpack(output[name])

    def rebuild(new: Tensor) -> Any:
        return type(output)(**{**output, name: pack(new)})

    return tensor, rebuild


@contextmanager
def hooked(module: nn.Module, name: str, forward: Callable[..., Any]) -> Iterator[None]:
    """Put `forward(module, original, args, kwargs)` in the place of a module's own, for a while.

    It goes through Diffusers' hook registry, so it composes with offloading and with the caches of
    that library. Afterwards the module is as it was: the registry itself leaves traces.
    """
    from diffusers.hooks import HookRegistry, ModelHook

    class Hook(ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return forward(module, self.fn_ref.original_forward, args, kwargs)

    had_registry = hasattr(module, "_diffusers_hook")
    had_forward = "forward" in module.__dict__
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(Hook(), name)
    try:
        yield
    finally:
        registry.remove_hook(name, recurse=False)
        if not had_forward:
            module.__dict__.pop("forward", None)
        if not had_registry:
            module.__dict__.pop("_diffusers_hook", None)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Let Diffusers' caches inside a network begin anew, and then go on as if nothing had been."""
    registries = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    hooks = [hook for registry in registries if registry for hook in registry.hooks.values()]
    kept: list[tuple[Any, dict[str, Any]]] = []
    for hook in hooks:
        for state in vars(hook).values() if hook._is_stateful else ():
            if hasattr(state, "reset"):
                kept.append((state, dict(vars(state))))
                if hasattr(state, "_state_cache"):  # one state for each branch of guidance
                    state._state_cache = {}
                else:
                    state.reset()
    try:
        yield
    finally:
        for state, values in kept:
            vars(state).clear()
            vars(state).update(values)
