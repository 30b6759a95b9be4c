"""One call of a pipeline with a plan on it: what the plan does at each point of the loop."""

from __future__ import annotations

import functools
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.denoise.blocks import Inside
from hasten.denoise.guidance import Guidance, find_guidance
from hasten.denoise.layout import Layout
from hasten.denoise.levels import Level, level
from hasten.denoise.network import Call, hooked, networks, unpack
from hasten.denoise.slots import (
    Attention,
    Block,
    DenoiseTechnique,
    Gate,
    Guider,
    Schedule,
    State,
)
from hasten.errors import PlanError

NAME = "hasten"


@dataclass
class Slots:
    """The techniques of a call with what `bind` made of them, one for each slot."""

    schedule: tuple[Schedule, Any] | None = None
    gate: tuple[Gate, Any] | None = None
    guider: tuple[Guider, Any] | None = None
    block: tuple[Block, Any] | None = None
    attention: tuple[Attention, Any] | None = None
    state: tuple[State, Any] | None = None

    @classmethod
    def fill(cls, bound: Iterable[tuple[Any, Any]]) -> Self:
        """Put each technique into the slots that its contract names."""
        slots = cls()
        for technique, made in bound:
            for slot in technique.terms().slots:
                if slot.engine != "denoise":
                    raise PlanError(
                        f"{technique.name} is of the {slot.engine} engine, and this is a pipeline of the "
                        f"denoise one; `hasten list --engine denoise` shows what fits."
                    )
                setattr(slots, slot.label, (technique, made))
        return slots

    def entries(self) -> list[tuple[DenoiseTechnique, Any]]:
        """Each technique once, in the order of the slots."""
        found = [getattr(self, field.name) for field in fields(self)]
        return list({id(e[0]): e for e in found if e is not None}.values())


@dataclass
class Step:
    """One step of the solver.

    Attributes:
        index: how many steps were made before it.
        timestep: what the scheduler is called with.
        output: the network's output after guidance.
        sample: the noisy sample before the step, in the scheduler's scale.
        ran: whether the network ran at this step.
        result: the sample after the step, once it is there.
    """

    index: int
    timestep: Any
    output: Tensor
    sample: Tensor
    ran: bool
    result: Tensor | None = None


class Run:
    """A call in progress.

    Attributes:
        pipe, scheduler: the pipeline and its scheduler.
        index: steps made so far; it is the number of the step in hand.
        num_steps: how many steps there will be.
        first: how many of the scheduler's timesteps the pipeline leaves out at the start, as
            pipelines that begin with a picture do; known from the first step on.
        calls: network calls of the step in hand.
        computed: (rows, ...) outputs of the calls of the last step that ran, as the pipeline got them.
        running: whether the network runs at this step.
        guidance: how the pipeline combines its branches, once that is known.
        layout: which tokens are the sample's, while the network runs.
        activity: counters; "calls" that ran, "skipped" ones, "rows" computed, "steps".
        seconds: time spent in the network.
    """

    def __init__(self, pipe: Any, slots: Slots) -> None:
        self.pipe = pipe
        self.scheduler = pipe.scheduler
        self.slots = slots
        self.index = 0
        self.num_steps = 0
        self.first = 0
        self.calls = 0
        self.computed: list[Tensor] = []
        self.running = True
        self.both = True
        self.guidance: Guidance | None = None
        self.layout = Layout()
        self.activity: Counter[str] = Counter()
        self.states: dict[int, Any] = {}
        self.seconds = 0.0
        self.trace: list[Step] | None = None  # every step, where someone asks
        self._shape: torch.Size | None = None
        self._call: Call | None = None

    # -- what techniques read ----------------------------------------------------------------------
    def state(self, entry: tuple[DenoiseTechnique, Any]) -> Any:
        """What a technique remembers of this call."""
        return self.states[id(entry[0])]

    @property
    def call(self) -> Call:
        """The network call in hand."""
        assert self._call is not None
        return self._call

    @property
    def is_last(self) -> bool:
        """Whether the step in hand is the last one."""
        return self.index == self.num_steps - 1

    def level(self, step: Step) -> Level:
        """The noise level at which a step starts."""
        return level(self.scheduler, self.first + step.index, step.timestep)

    def span(self, first: float, last: float, of: float = 50) -> range:
        """Steps `first` to `last` (exclusive) of a sampler of `of` steps, for this number of steps."""
        scale = self.num_steps / of
        return range(round(first * scale), round(last * scale))

    def fit(self, kept: Tensor, rows: int) -> Tensor | None:
        """What was kept of a call, for a call of so many rows; None where it does not fit them.

        A guider may leave out the unconditional rows of a call after both halves were kept.
        """
        if len(kept) == rows:
            return kept
        guidance = self.guidance
        if guidance is not None and guidance.batched and len(kept) == 2 * rows:
            return kept.chunk(2)[guidance.conditional]
        return None

    # -- around the pipeline -----------------------------------------------------------------------
    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the pipeline's network and scheduler, for one call of it."""
        with ExitStack() as stack:
            for module in networks(self.pipe):
                stack.enter_context(hooked(module, NAME, self._network))
                inside = Inside(self, module)
                stack.enter_context(inside.attached())
            stack.enter_context(_replaced(self.scheduler, "set_timesteps", self._set_timesteps))
            stack.enter_context(_replaced(self.scheduler, "step", self._step))
            stack.callback(self._finish)
            self._begin()
            yield

    def asked(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the pipeline's call as the plan wants them."""
        if self.slots.schedule is None:
            return args, kwargs
        names = list(inspect.signature(self.pipe.__call__).parameters)
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        self.slots.schedule[0].ask(self.state(self.slots.schedule), self, arguments)
        return args[len(names) :], arguments

    def _begin(self) -> None:
        for technique, bound in self.slots.entries():
            self.states[id(technique)] = technique.begin(self, bound)

    def _restart(self) -> None:
        """Begin anew what remembers tensors of the sample's size."""
        keep = [e for e in (self.slots.schedule, self.slots.state, self.slots.guider) if e]
        kept = {id(e[0]) for e in keep}
        for technique, bound in self.slots.entries():
            if id(technique) not in kept:
                technique.finish(self.states[id(technique)], self)
                self.states[id(technique)] = technique.begin(self, bound)

    def _finish(self) -> None:
        for technique, _ in self.slots.entries():
            if id(technique) in self.states:
                technique.finish(self.states[id(technique)], self)

    # -- the scheduler's timesteps -----------------------------------------------------------------
    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        self.index, self.calls, self.first = 0, 0, 0
        self.num_steps = len(self.scheduler.timesteps)
        if self.slots.schedule is not None:
            self.slots.schedule[0].plan(self.state(self.slots.schedule), self)
            self.num_steps = len(self.scheduler.timesteps)
        return made

    # -- a network call ----------------------------------------------------------------------------
    def _network(
        self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        call = Call(module, args, dict(kwargs), self.calls)
        if self.slots.state is not None:
            self.slots.state[0].feed(self.state(self.slots.state), self, call)
        x = call.x
        if self._shape is not None and x.shape[1:] != self._shape:
            self._restart()
        self._shape = x.shape[1:]
        self._call = call
        if self.calls == 0:
            self.running = self._decide(call)
            if self.running:
                self.computed = []
        self.calls += 1
        gate = self.slots.gate
        if not self.running and self._known(call):
            assert gate is not None
            self.activity["skipped"] += 1
            return self._pack(gate[0].predict(self.state(gate), self, call))
        output, self._pack = self._compute(call, original)
        if self.running:
            self.computed.append(output)
            if gate is not None:
                gate[0].observe(self.state(gate), self, call, output)
        return self._pack(output)

    def _known(self, call: Call) -> bool:
        """Whether the last step that ran made such a call; some guide for a part of the way only."""
        if call.branch >= len(self.computed):
            return False
        return len(self.computed[call.branch]) == call.rows

    _pack: Callable[[Tensor], Any]

    def _decide(self, call: Call) -> bool:
        run = True
        if self.slots.gate is not None and self._known(call):
            run = self.slots.gate[0].decide(self.state(self.slots.gate), self, call)
        if run and self.slots.guider is not None:
            guider, known = self.slots.guider, self.guidance is not None
            self.both = not known or guider[0].both(self.state(guider), self, call)
        return run

    def _compute(
        self, call: Call, original: Callable[..., Any]
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Run the network on what the guider leaves of a call."""
        guidance, guider = self.guidance, self.slots.guider
        if self.both or guidance is None or guider is None:
            return self._run_network(call, original)
        assert guider is not None
        state = self.state(guider)
        if guidance.batched:
            rows = guidance.rows(call.rows)
            output, pack = self._run_network(call.take(rows), original)
            other = guider[0].missing(state, self, output)
            return guidance.join(output, other), pack
        if call.branch == guidance.conditional:
            return self._run_network(call, original)
        if guidance.conditional < call.branch:  # the conditional branch is there already
            self.activity["left_out"] += 1
            return guider[0].missing(state, self, self.computed[guidance.conditional]), self._pack
        # The unconditional branch comes first, so it is computed with nothing to stand for it.
        return self._run_network(call, original)

    def _run_network(
        self, call: Call, original: Callable[..., Any]
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        self._call = call
        self.layout = Layout.of(call)
        start = time.perf_counter()
        output, pack = unpack(original(**call.kwargs))
        self.seconds += time.perf_counter() - start
        self.activity["calls"] += 1
        self.activity["rows"] += call.rows
        if self.slots.state is not None:
            output = self.slots.state[0].receive(self.state(self.slots.state), self, call, output)
        return output, pack

    # -- a step of the solver ----------------------------------------------------------------------
    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        given = bound.arguments
        if self.index == 0:
            self._find_first(given["timestep"])
        step = Step(
            self.index, given["timestep"], given["model_output"], given["sample"], self.running
        )
        self._compare(step)
        gate, state = self.slots.gate, self.slots.state
        if gate is not None:
            step.output = gate[0].correct(self.state(gate), self, step)
        returned: list[Any] = []

        def solve() -> Tensor:
            given["model_output"], given["sample"] = step.output, step.sample
            returned.append(original(*bound.args, **bound.kwargs))
            return _sample_of(returned[-1])

        step.result = (
            solve() if state is None else state[0].advance(self.state(state), self, step, solve)
        )
        if gate is not None:
            gate[0].stepped(self.state(gate), self, step)
        if self.trace is not None:
            self.trace.append(step)
        self.index += 1
        self.calls = 0
        self.activity["steps"] += 1
        if not returned:
            return _made(step.result, given.get("return_dict", True))
        made = returned[-1]
        return made if step.result is _sample_of(made) else _with_sample(made, step.result)

    def _find_first(self, timestep: Any) -> None:
        """See at which of the scheduler's timesteps the loop began."""
        times = self.scheduler.timesteps
        if torch.as_tensor(timestep).numel() == 1:
            found = (times == torch.as_tensor(timestep).to(times.device)).nonzero()
            self.first = int(found[0]) if len(found) else 0
            self.num_steps = len(times) - self.first

    def _compare(self, step: Step) -> None:
        """Find out how the branches are combined, and tell the guider of both."""
        guider = self.slots.guider
        if guider is None or not self.running or not self.both:
            return
        if self.guidance is None:
            self.guidance = find_guidance(self.computed, step.output)
        if self.guidance is not None:
            pair = self.guidance.split(self.computed)
            guider[0].compare(self.state(guider), self, *pair, step.sample)


def _sample_of(made: Any) -> Tensor:
    return made[0] if isinstance(made, tuple) else made.prev_sample


def _made(sample: Tensor, as_object: bool) -> Any:
    """What a scheduler returns for a step that it did not make."""
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    return SchedulerOutput(prev_sample=sample) if as_object else (sample,)


def _with_sample(made: Any, sample: Tensor) -> Any:
    if isinstance(made, tuple):
        return (sample, *made[1:])
    return type(made)(**{**made, "prev_sample": sample})


@contextmanager
def _replaced(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Put `wrapper(original, ...)` in the place of a method, for a while; its signature stays."""
    original = getattr(owner, name)
    had = name in vars(owner)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
