"""A Diffusers pipeline with a plan on it: call it, undo it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import Any

from hasten.applied import AppliedPlan
from hasten.denoise.call_settings import settings_of
from hasten.denoise.compiled import check_runner, compiled
from hasten.denoise.inputs import COUNT, check_steps
from hasten.denoise.network import networks
from hasten.denoise.run import Run, Slots
from hasten.denoise.suits import check_plan
from hasten.parts import parts_for_call
from hasten.plan import Plan
from hasten.subject import Subject
from hasten.technique import Parts


class DenoiseModel(AppliedPlan):
    """What `hasten.apply` returns for a Diffusers pipeline.

    It is called as the pipeline is, and returns what the pipeline returns. The plan acts during
    such a call only; the pipeline itself stays as it was.

    Attributes:
        plan: the techniques, in the order in which they were written.
        runner: what executes the network: "eager" or "compiled".
        activity: counters of the last call; "calls" are network calls that ran, "skipped" those
            that did not, "rows" the samples computed, "steps" the solver's.
        seconds: the last call's duration; `network_seconds`: the part of it inside the network.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        *,
        runner: str = "eager",
        parts: dict[str, Parts] | None = None,
        exclusive: bool = True,
    ) -> None:
        check_runner(runner, plan)
        pipe = subject.pipe
        assert pipe is not None, "the subject is of another engine"
        check_plan(pipe, plan)
        super().__init__(subject, plan, networks(pipe)[0], parts, exclusive=exclusive)
        self.pipe = pipe
        self.runner = runner
        self._slots()  # a technique of another engine is refused now
        self.seconds = 0.0
        self.network_seconds = 0.0
        self._claim()

    def _slots(self) -> Slots:
        return Slots.fill(self.bound)

    # -- calls -----------------------------------------------------------------------------------
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, as the pipeline does: the same arguments, the same result."""
        return self._execute(self.start(), *args, **kwargs)

    generate = __call__

    def stream(
        self, frames: Iterable[Any], *, output_type: str = "pt", **arguments: Any
    ) -> Iterator[Any]:
        """Run a stream of frames through the pipeline; see `hasten.denoise.stream.stream`."""
        from hasten.denoise.stream import stream

        return stream(self, frames, output_type=output_type, **arguments)

    def start(self) -> Run:
        """A call that has not begun; `_execute` runs it."""
        self._check_open()
        return Run(self.pipe, self._slots())

    def _execute(self, run: Run, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get(COUNT) is not None:
            check_steps(self.pipe, kwargs[COUNT])
        if self._take_parts(args, kwargs):
            run.slots = self._slots()
        start = time.perf_counter()
        try:
            with (
                compiled(self.pipe) if self.runner == "compiled" else nullcontext(),
                run.attached(),
            ):
                args, kwargs = run.asked(args, kwargs)
                return self.pipe(*args, **kwargs)
        finally:
            self.seconds = time.perf_counter() - start
            self.network_seconds = run.seconds
            self.activity = dict(run.activity)

    def _take_parts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take the trained parts that were made for such a call; whether any are others than before.

        Raises:
            PlanError: where a technique's parts are for other calls, and there are none for this one.
        """
        choosing = [t for t in self.plan if t.trained and t.part_settings]
        if not choosing:
            return False
        names = inspect.signature(self.pipe.__call__).parameters
        settings = settings_of(self.pipe, {**dict(zip(names, args, strict=False)), **kwargs})
        changed = False
        for technique in choosing:
            had = self.parts[technique.name]
            parts = parts_for_call(technique, self.subject, had, settings)
            if parts is not had:
                self.parts[technique.name], changed = parts, True
        if changed:
            self._bind()
        return changed
