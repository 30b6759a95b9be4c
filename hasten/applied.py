"""A plan that is on a model: one at a time, taken off by `undo`, or at the end of a `with`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Generic, Self, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hasten.errors import PlanError, SubjectError
from hasten.parts import parts_for
from hasten.plan import Plan
from hasten.subject import Subject
from hasten.technique import Parts, Technique

R = TypeVar("R")

_APPLIED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def runs_on(runner: str, plan: Plan) -> bool:
    """Whether every technique of the plan can run on a runner."""
    return all(runner in technique.terms().runners for technique in plan)


def check_runs_on(runner: str, plan: Plan) -> None:
    """Raise a PlanError where a technique of the plan cannot run on a runner."""
    for technique in plan:
        runners = technique.terms().runners
        if runner not in runners:
            raise PlanError(
                f"{technique.name} does not run on the {runner!r} runner; it runs on: {', '.join(sorted(runners))}."
            )


class Runners(Generic[R]):
    """The runners of an engine: one per model and kind, as a compiled one keeps its graphs."""

    def __init__(self, kinds: Mapping[str, Callable[[PreTrainedModel], R]]) -> None:
        self.kinds = kinds
        self._made: weakref.WeakKeyDictionary[PreTrainedModel, dict[str, R]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self, name: str, model: PreTrainedModel, plan: Plan) -> R:
        """The runner of that name.

        Raises:
            PlanError: where there is none, or a technique of the plan cannot run on it.
        """
        check_runs_on(name, plan)
        if name not in self.kinds:
            raise PlanError(f"Unknown runner {name!r}; there are: {', '.join(sorted(self.kinds))}.")
        made = self._made.setdefault(model, {})
        if name not in made:
            made[name] = self.kinds[name](model)
        return made[name]


def check_engine(subject: Subject, engine: str) -> None:
    """Raise a SubjectError where a subject runs on another engine."""
    if subject.engine != engine:
        raise SubjectError(
            f"{subject.name} runs on the {subject.engine} engine, not on the {engine} one; hasten.apply "
            "picks the engine."
        )


class AppliedPlan:
    """What `hasten.apply` returns, whatever the engine.

    Attributes:
        subject: the model with what is known of it.
        plan: the techniques, in the order in which they were written.
        parts: trained tensors by technique.
        bound: (technique, what it built for this model) in the order in which they act.
        activity: counters of the last call.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        owner: nn.Module,
        parts: dict[str, Parts] | None,
        *,
        exclusive: bool,
    ) -> None:
        """Bind a plan.

        Args:
            owner: the network that may carry one plan only.
            exclusive: False lets plans stand beside each other, as a benchmark needs it.

        Raises:
            PlanError: where the network has a plan already, or a trained part is missing.
        """
        if exclusive and owner in _APPLIED:
            raise PlanError(
                f"This model has the plan {_APPLIED[owner] or '(empty)'!r} on it already; call undo() first."
            )
        self.subject = subject
        self.plan = plan
        self.parts = {t.name: parts_for(t, subject, parts or {}) for t in plan}
        self._owner = owner
        self.bound: list[tuple[Technique, Any]] = []
        self._bind()
        self.activity: dict[str, int] = {}
        self._open = True
        self._exclusive = exclusive

    def _bind(self) -> None:
        """Let each technique build from its parts what it needs for this model."""
        self.bound = [(t, t.bind(self._owner, self.parts[t.name])) for t in self.plan.ordered()]

    def _claim(self) -> None:
        """Mark the network as taken; the last step of an engine's own set-up."""
        if self._exclusive:
            _APPLIED[self._owner] = str(self.plan)

    def _check_open(self) -> None:
        if not self._open:
            raise PlanError("The plan was undone; apply it again to use it.")

    def undo(self) -> None:
        """Take the plan off; the model is what it was, and this object cannot be used any more."""
        if self._open:
            self._open = False
            self.bound = []
            if self._exclusive:
                _APPLIED.pop(self._owner, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()
