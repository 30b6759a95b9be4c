"""Trained parts that plans lack on a model: trained before anything is measured, or asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hasten.api import prepare
from hasten.denoise.call_settings import settings_of
from hasten.errors import PlanError
from hasten.parts import find
from hasten.plan import Plan
from hasten.subject import Subject
from hasten.technique import Technique

Tick = Callable[[int, int, str], None]

PREPARE_BYTES = 4_000_000  # of the standard library, to train parts of language models on


def check_parts(
    subject: Subject, plans: Iterable[Plan], arguments: Mapping[str, Any] | None = None
) -> None:
    """Raise one PlanError that names every part that is missing; `arguments` as for `train_parts`."""
    absent = [str(Plan.parse(technique)) for technique in missing(subject, plans, arguments)]
    if absent:
        options = " ".join(f'--with "{text}"' for text in absent)
        raise PlanError(
            f"No trained part for {', '.join(absent)} on {subject.name}; let the benchmark train it (leave out "
            f"--no-prepare, or give prepare_missing=True), or run `hasten prepare {subject.name} {options}`."
        )


def train_parts(
    subject: Subject,
    plans: Iterable[Plan],
    *,
    seed: int,
    tick: Tick,
    prompts: Sequence[Any] = (),
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Train what is missing, and keep it where `apply` finds it.

    Each technique's parts are written once they are done, so whoever breaks off has those that were.

    Args:
        prompts, arguments: for a Diffusers pipeline, as `hasten.prepare` takes them.
    """
    absent = missing(subject, plans, arguments)
    texts = _texts() if absent and subject.pipe is None else []
    for number, technique in enumerate(absent, start=1):
        place = f" ({number} of {len(absent)})" if len(absent) > 1 else ""
        words = f"training {Plan.parse(technique)}{place}"
        tick(0, 1, words)
        prepare(
            subject,
            technique,
            texts=texts,
            prompts=prompts,
            arguments=arguments,
            seed=seed,
            tick=_naming(tick, words),
        )


def missing(
    subject: Subject, plans: Iterable[Plan], arguments: Mapping[str, Any] | None = None
) -> list[Technique]:
    """Techniques that need parts for this model and find none, each once.

    Args:
        arguments: of a pipeline's call, for which the parts are to be.
    """
    settings = None if subject.pipe is None else settings_of(subject.pipe, arguments or {})
    absent = {
        str(Plan.parse(technique)): technique
        for plan in plans
        for technique in plan
        if technique.trained and find(technique, subject.hash, settings) is None
    }
    by_part = {(t.name, tuple(t.knobs[k] for k in t.part_knobs)): t for t in absent.values()}
    return list(by_part.values())


def _texts() -> list[str]:
    from hasten.zoo.corpus import training_texts

    return training_texts(PREPARE_BYTES)


def _naming(tick: Tick, words: str) -> Tick:
    """A tick that says what it is about."""
    return lambda done, total, message: tick(done, total, f"{words}: {message}")
