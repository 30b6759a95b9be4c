"""The caches that Diffusers itself ships, run through the same harness as everything else.

They are that library's own hooks, put on for the time of a call and taken off after it. What is
ours: each call of a step has a memory of its own (Diffusers gives some of its hooks only one, so
that pipelines which run their branches one after the other would mix them up); the step and its
noise level are handed to hooks that ask for them, whether the pipeline does so or not; and what
they save is counted, as layers that were entered and not computed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hasten.denoise.blocks import blocks
from hasten.denoise.levels import level
from hasten.denoise.network import Call, hooked, networks
from hasten.denoise.run import Run
from hasten.denoise.slots import Block, Gate
from hasten.errors import SubjectError
from hasten.technique import (
    Card,
    Contract,
    Loss,
    Parts,
    Resource,
    Slot,
)

NAME = "hasten_cache"


class Watch:
    """What hooks ask of the call in progress; `run` is None while a pipeline is only looked at."""

    def __init__(self, run: Run | None = None) -> None:
        self.run = run

    @property
    def timestep(self) -> float:
        """The step's timestep, between 0 and about 1000."""
        if self.run is None:
            return 0.0
        times = self.run.scheduler.timesteps
        return float(times[min(self.run.first + self.run.index, len(times) - 1)])

    @property
    def noise_share(self) -> float | None:
        """sigma / (alpha + sigma) at the step; None for a scheduler that does not say."""
        assert self.run is not None
        try:
            here = level(self.run.scheduler, self.run.first + self.run.index, self.timestep)
        except SubjectError:
            return None
        return here.sigma / (here.alpha + here.sigma)


class DiffusersCache(Gate, Block):
    """A cache of Diffusers; what each adds is how its hooks are put on."""

    def put_on(self, network: nn.Module, watch: Watch, parts: Parts) -> None:
        """Register the hooks on a network."""
        raise NotImplementedError

    def adjust(self, hook: Any, run: Run, call: Call) -> None:
        """Set on a hook what is only known at a call."""

    def check(self, pipe: Any) -> None:
        """Try the hooks on, and take them off again."""
        for network in networks(pipe):
            with worn(self, network, Watch(), self.example()):
                pass

    def example(self) -> Parts:
        """Parts that only serve to look whether the hooks fit."""
        return {}

    def begin(self, run: Run, bound: Any) -> ExitStack:
        """Put the hooks on; the state is what takes them off."""
        with ExitStack() as stack:
            for network in networks(run.pipe):
                hooks = stack.enter_context(worn(self, network, Watch(run), bound))
                stack.enter_context(_counted(hooks, f"{self.name}.reused", run))
                stack.enter_context(hooked(network, NAME, self.around(run, hooks)))
                look_again(network)
            return stack.pop_all()

    def restart(self, state: ExitStack, run: Run, bound: Any) -> ExitStack:
        """The hooks stay; `around` has made them forget before the network was entered."""
        return state

    def finish(self, state: ExitStack, run: Run) -> None:
        """Take the hooks off."""
        state.close()

    def around(self, run: Run, hooks: list[Any]) -> Callable[..., Any]:
        """The network's forward pass with the hooks' memory of this call of the step."""
        from diffusers.models.cache_utils import CacheMixin

        memories: dict[tuple[int, int], Any] = {}
        watch, shape = Watch(run), torch.Size()

        def forward(module: nn.Module, original: Any, args: Any, kwargs: Any) -> Any:
            nonlocal shape
            call = Call(module, args, kwargs, run.calls)
            if shape != call.x.shape[1:]:
                shape = call.x.shape[1:]
                memories.clear()
                for hook in hooks:
                    hook.reset_state(module)
            for number, hook in enumerate(hooks):
                if hasattr(hook, "state"):
                    fresh = type(hook.state)
                    hook.state = memories.setdefault((number, call.branch), fresh())
                self.adjust(hook, run, call)
            mixin: Any = CacheMixin
            place = {"step_index": run.index, "num_inference_steps": run.num_steps}
            with (
                _explained(self.name, module),
                mixin.cache_context(
                    module, f"call {call.branch}", sigma=watch.noise_share, **place
                ),
            ):
                return original(*args, **kwargs)

        return forward


@contextmanager
def _explained(name: str, network: nn.Module) -> Iterator[None]:
    """Say whose fault it is where a hook itself fails on what the network's layers make."""
    try:
        yield
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if "diffusers.hooks" not in str(frame.f_globals.get("__name__")):
            raise
        raise _unsupported(name, network, error) from error


def _unsupported(name: str, network: nn.Module, error: Exception) -> SubjectError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return SubjectError(f"Diffusers' {name} does not support {type(network).__name__}: {reason}.")


@contextmanager
def worn(
    cache: DiffusersCache, network: nn.Module, watch: Watch, parts: Parts
) -> Iterator[list[Any]]:
    """The hooks of a cache on a network, for a while; afterwards no trace of them is left."""
    before = {
        module: (
            set(hooks_of(module)),
            "_diffusers_hook" in vars(module),
            "forward" in vars(module),
        )
        for module in network.modules()
    }
    try:
        try:
            cache.put_on(network, watch, parts)
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise _unsupported(cache.name, network, error) from error
        worn = [
            hook
            for module, (had, *_) in before.items()
            for name, hook in hooks_of(module).items()
            if name not in had
        ]
        if not any(hook.fn_ref.original_forward is not None for hook in worn):
            raise SubjectError(
                f"Diffusers' {cache.name} finds no layer of {type(network).__name__} to act on."
            )
        yield worn
    finally:
        for module, (had, had_registry, had_forward) in before.items():
            for name in reversed([name for name in hooks_of(module) if name not in had]):
                module._diffusers_hook.remove_hook(name, recurse=False)  # type: ignore[union-attr, operator]
            if not had_forward:
                vars(module).pop("forward", None)
            if not had_registry:
                vars(module).pop("_diffusers_hook", None)
        look_again(network)


def hooks_of(module: nn.Module) -> dict[str, Any]:
    registry: Any = vars(module).get("_diffusers_hook")
    return {} if registry is None else registry.hooks


def look_again(network: nn.Module) -> None:
    """Let registries look for hooks below them anew."""
    for module in network.modules():
        registry: Any = vars(module).get("_diffusers_hook")
        if registry is not None:
            registry._child_registries_cache = None


@contextmanager
def _counted(hooks: list[Any], counter: str, run: Run) -> Iterator[None]:
    """Count layers that a hook was asked for and did not compute."""
    references = [h.fn_ref for h in hooks if h.fn_ref.original_forward is not None]
    kept = [(reference, reference.original_forward, reference.forward) for reference in references]

    def watched(original: Callable[..., Any], forward: Callable[..., Any]) -> Any:
        entered = 0

        def compute(*args: Any, **kwargs: Any) -> Any:
            nonlocal entered
            entered += 1
            return original(*args, **kwargs)

        def ask(*args: Any, **kwargs: Any) -> Any:
            before = entered
            output = forward(*args, **kwargs)
            if entered == before:
                run.activity[counter] += 1
            return output

        return compute, ask

    for reference, original, forward in kept:
        reference.original_forward, reference.forward = watched(original, forward)
    try:
        yield
    finally:
        for reference, original, forward in kept:
            reference.original_forward, reference.forward = original, forward


def of_diffusers(name: str) -> Any:
    """A class or function of Diffusers' hooks.

    Raises:
        SubjectError: where the installed version has none of that name.
    """
    import diffusers

    found = getattr(diffusers.hooks, name, None)
    if found is None:
        raise SubjectError(f"Diffusers {diffusers.__version__} has no {name}; use a newer version.")
    return found


def check_text(network: nn.Module) -> None:
    """Raise where the last block gives no text tokens back, which some hooks want of it."""
    if any(getattr(block, "context_pre_only", False) for block in blocks(network)):
        raise ValueError("its last block gives no text tokens back, and the hook wants them")


def cache_card(title: str, link: str, neutral: dict[str, Any], **more: Any) -> Card:
    return Card(
        title=f"{title}, as Diffusers ships it",
        family="diffusion",
        loss=Loss.LOSSY,
        link=link,
        neutral=neutral,
        **{"saves": "blocks", **more},
    )


CONTRACT = Contract(
    slots=(Slot.GATE, Slot.BLOCK),
    needs=frozenset({Resource.TRAJECTORY, Resource.EVERY_CALL, Resource.TOKEN_SET}),
)
