"""One call of a pipeline with a plan on it: what the plan does at each point of the loop."""

from __future__ import annotations

import functools
import inspect
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from hasten.denoise.guidance import Guidance, find_guidance, like
from hasten.denoise.inside import Inside
from hasten.denoise.layout import Layout, sample_tokens
from hasten.denoise.levels import Level, level
from hasten.denoise.network import Call, hooked, networks, undisturbed, unpack
from hasten.denoise.schedule.grid import Divisor
from hasten.denoise.slots import (
    Attention,
    Block,
    DenoiseTechnique,
    Gate,
    Guider,
    Schedule,
    State,
)
from hasten.denoise.suits import check_call
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
        rows: which rows of the pipeline's call the network computes, while it runs.
        guidance: how the pipeline combines its branches, once that is known.
        activity: counters; "calls" that ran, "skipped" ones, "rows" computed, "steps".
        seconds: time spent in the network.
        arguments: of the pipeline's call, as the caller gave them.
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
        self.wanted: Tensor | None = None  # samples whose unconditional branch runs; None: all
        self.guidance: Guidance | None = None
        self._layout: Layout | None = None
        self.activity: Counter[str] = Counter()
        self.states: dict[int, Any] = {}
        self.seconds = 0.0
        self.rows: tuple[int, ...] = ()
        self.trace: list[Step] | None = None  # every step, where someone asks
        self.gaps: list[int] | None = None  # lengths of the steps (`schedule.grid`)
        self._shape: torch.Size | None = None
        self._call: Call | None = None
        self.looking = False  # a forward pass is under way that is not the pipeline's
        self._tokens: dict[tuple[int, int, int], range | None] = {}
        self.arguments: dict[str, Any] = {}

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
    def layout(self) -> Layout:
        """How the tokens of the call in hand lie, while the network runs."""
        if self._layout is None:  # not before someone asks: to read places off a device takes time
            find = functools.partial(self._find_tokens, self.call, self._original)
            self._layout = Layout.of(self.call, find)
        return self._layout

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

    def fit(self, kept: Tensor, had: tuple[int, ...]) -> Tensor | None:
        """What was kept of a call, for the rows that the call in hand holds; None where some lack.

        A guider may leave out unconditional rows after all were kept, and ask for them again.

        Args:
            kept: (rows, ...) of `run.rows` as it was then; or so many times as many, row by row.
            had: `run.rows` as it was then.
        """
        if had == self.rows:
            return kept
        if not set(self.rows) <= set(had):
            return None
        places = torch.tensor([had.index(row) for row in self.rows], device=kept.device)
        return kept.unflatten(0, (len(had), -1)).index_select(0, places).flatten(0, 1)

    # -- around the pipeline -----------------------------------------------------------------------
    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen to the pipeline's network and scheduler, for one call of it."""
        with ExitStack() as stack:
            for module in networks(self.pipe):
                stack.enter_context(hooked(module, NAME, self._network))
                inside = Inside(self, module)
                stack.enter_context(inside.attached())
            stack.enter_context(_listening(self.scheduler, "set_timesteps", self._set_timesteps))
            stack.enter_context(_listening(self.scheduler, "step", self._step))
            stack.callback(self._finish)
            self._begin()
            yield

    def asked(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the pipeline's call as the plan wants them."""
        names = list(inspect.signature(self.pipe.__call__).parameters)
        self.arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        return args[len(names) :], self._ask()

    def _ask(self) -> dict[str, Any]:
        arguments = dict(self.arguments)
        for technique, _ in self.slots.entries():
            technique.ask(self.states[id(technique)], self, arguments)
        return arguments

    def _begin(self) -> None:
        for technique, bound in self.slots.entries():
            self.states[id(technique)] = technique.begin(self, bound)

    def _begin_again(self) -> None:
        """Forget the loop that was walked: the call goes on with another sample, from noise again.

        Pipelines that make a clip chunk by chunk do so. What is remembered of one chunk says nothing
        of the next, even where both have the same shape.
        """
        self._finish()
        self.computed, self.running, self.wanted = [], True, None
        self.guidance, self._shape = None, None
        self._tokens.clear()
        self._begin()
        if self.arguments:
            self._ask()  # some techniques note what they are asked with

    def _restart(self) -> None:
        """Begin anew what remembers tensors of the sample's size."""
        self.computed = []
        keep = [e for e in (self.slots.schedule, self.slots.state, self.slots.guider) if e]
        kept = {id(e[0]) for e in keep}
        for technique, bound in self.slots.entries():
            if id(technique) not in kept:
                state = self.states[id(technique)]
                self.states[id(technique)] = technique.restart(state, self, bound)

    def _finish(self) -> None:
        for technique, _ in self.slots.entries():
            if id(technique) in self.states:
                technique.finish(self.states[id(technique)], self)

    # -- the scheduler's timesteps -----------------------------------------------------------------
    def _set_timesteps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        if self.index:
            self._begin_again()
        self.index, self.calls, self.first, self.gaps = 0, 0, 0, None
        self.num_steps = len(self.scheduler.timesteps)
        planners = {id(e[0]): e for e in (self.slots.schedule, self.slots.state) if e is not None}
        for entry in planners.values():
            entry[0].plan(self.state(entry), self)
        self.num_steps = len(self.scheduler.timesteps)
        return made

    # -- a network call ----------------------------------------------------------------------------
    def _network(
        self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        call = Call(module, args, dict(kwargs), self.calls)
        if call.fills_cache:
            return self._fill_cache(call, original)
        check_call(call, self.slots.entries())
        if self.slots.state is not None:
            self.slots.state[0].feed(self.state(self.slots.state), self, call)
        if self.index == 0 and self.calls == 0:
            self._find_first(call.timestep)
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

    def _fill_cache(self, call: Call, original: Callable[..., Any]) -> Any:
        """Run a call that belongs to no step, with no technique inside the network either."""
        start, self.looking = time.perf_counter(), True
        try:
            return original(**call.kwargs)
        finally:
            self.looking = False
            self.seconds += time.perf_counter() - start
            self.activity["calls"] += 1
            self.activity["rows"] += call.rows

    def _known(self, call: Call) -> bool:
        """Whether the last step that ran made such a call; some guide for a part of the way only."""
        if call.branch >= len(self.computed):
            return False
        return len(self.computed[call.branch]) == call.rows

    _pack: Callable[[Tensor], Any]
    _original: Callable[..., Any]

    def _decide(self, call: Call) -> bool:
        run = True
        if self.slots.gate is not None and self._known(call):
            run = self.slots.gate[0].decide(self.state(self.slots.gate), self, call)
        if run and self.slots.guider is not None:
            self.wanted = None
            if self.guidance is not None and self.guidance.holds(call.rows):
                guider = self.slots.guider
                wanted = guider[0].wanted(self.state(guider), self, call)
                self.wanted = None if bool(wanted.all()) else wanted
        return run

    def _compute(
        self, call: Call, original: Callable[..., Any]
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Run the network on what the guider leaves of a call."""
        guidance, guider, wanted = self.guidance, self.slots.guider, self.wanted
        if wanted is None or guidance is None or guider is None:
            return self._run_network(call, original)
        state, some = self.state(guider), wanted.nonzero()[:, 0]
        if call.rows != len(wanted) * (2 if guidance.batched else 1):
            return self._run_network(call, original)  # this step's calls are others
        if guidance.batched:
            conditional = guidance.rows(call.rows, conditional=True)
            others = guidance.rows(call.rows, conditional=False)[some]
            kept = torch.cat([conditional, others]).sort().values
            ran, pack = self._run_network(call.take(kept), original, kept)
            first = ran[torch.searchsorted(kept, conditional)]
            missing = guider[0].missing(state, self, first)
            missing = _with_rows(missing, some, ran[torch.searchsorted(kept, others)])
            self.activity["left_out"] += len(wanted) - len(some)
            return guidance.join(first, missing), pack
        if call.branch <= guidance.conditional:
            # An unconditional branch that comes first has nothing yet to stand for it.
            return self._run_network(call, original)
        missing = guider[0].missing(state, self, self.computed[guidance.conditional])
        self.activity["left_out"] += len(wanted) - len(some)
        if not len(some):
            return missing, self._pack
        ran, pack = self._run_network(call.take(some), original, some)
        return _with_rows(missing, some, ran), pack

    def _run_network(
        self, call: Call, original: Callable[..., Any], rows: Tensor | None = None
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        self._call = call
        self.rows = tuple(range(call.rows) if rows is None else rows.tolist())
        self._layout, self._original = None, original
        start = time.perf_counter()
        output, pack = unpack(original(**call.kwargs))
        self.seconds += time.perf_counter() - start
        self.activity["calls"] += 1
        self.activity["rows"] += call.rows
        if self.slots.state is not None:
            output = self.slots.state[0].receive(self.state(self.slots.state), self, call, output)
        return output, pack

    def _find_tokens(self, call: Call, original: Callable[..., Any], length: int) -> range | None:
        """Which tokens of a joint sequence are the sample's; looked up once for each length."""
        key = (id(call.module), call.branch, length)
        if key not in self._tokens:
            self.looking = True
            try:
                with undisturbed(call.module):
                    self._tokens[key] = sample_tokens(original, call, length)
            finally:
                self.looking = False
        return self._tokens[key]

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
            with self._length():
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

    @contextmanager
    def _length(self) -> Iterator[None]:
        """Let a scheduler that knows steps of one length only make one of another."""
        if self.gaps is None:
            yield
            return
        steps = self.scheduler.num_inference_steps
        self.scheduler.num_inference_steps = Divisor(steps, self.gaps[self.first + self.index])
        try:
            yield
        finally:
            self.scheduler.num_inference_steps = steps

    def _find_first(self, timestep: Any) -> None:
        """See at which of the scheduler's timesteps the loop begins, and how many it makes.

        Pipelines that begin with a picture leave the first ones out; some leave the last ones out.
        """
        times = self.scheduler.timesteps
        # Pipelines note how many steps they make just before their loop.
        steps = getattr(self.pipe, "_num_timesteps", None) or len(times)
        time = torch.as_tensor(-1 if timestep is None else timestep).flatten()[:1]
        # Some schedulers say a time twice.
        places = (times == time.to(times.device)).nonzero()[:, 0].tolist()
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is None:
            begin = len(times) - steps if len(times) - steps in places else (places or [0])[0]
        self.first, self.num_steps = begin, min(len(times) - begin, steps)

    def _compare(self, step: Step) -> None:
        """Find out how the branches are combined, and tell the guider of both."""
        guider = self.slots.guider
        if guider is None or not self.running:
            return
        if self.guidance is None:
            self.guidance = find_guidance(self.computed, like(step.output, step.sample))
        if self.guidance is not None and self.guidance.fits(self.computed):
            pair = self.guidance.split(self.computed)
            samples = replace(step, sample=step.sample[: len(pair[0])])
            guider[0].compare(self.state(guider), self, *pair, samples)


def _with_rows(values: Tensor, rows: Tensor, by: Tensor) -> Tensor:
    return values.index_copy(0, rows.to(values.device), by) if len(rows) else values


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


class _Listener:
    """Stands for a method of an object, and hands each call with the method to somebody else."""

    def __init__(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self.owner, self.name, self.wrapper = owner, name, wrapper
        functools.update_wrapper(self, getattr(owner, name))  # pipelines look at the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapper(self.__wrapped__, *args, **kwargs)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy that a pipeline makes of the scheduler is its own."""
        other = memo.get(id(self.owner))
        return self if other is None else getattr(type(other), self.name).__get__(other)


@contextmanager
def _listening(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Put `wrapper(original, ...)` in the place of a method, for a while."""
    before = vars(owner).get(name)
    setattr(owner, name, _Listener(owner, name, wrapper))
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)
