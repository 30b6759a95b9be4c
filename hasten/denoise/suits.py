"""Networks that take techniques in some slots only; most take them in all.

What a slot asks of a network, all others give: rows that can be cut apart, blocks whose input and
output are the sample's tokens, attention over one sequence of them. Where a network does without,
a technique of such a slot would fail inside it, or do nothing without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from hasten.denoise.network import PACKED, Call, networks, parameters
from hasten.errors import SubjectError
from hasten.technique import Slot, Technique

# A parameter of the network's forward that such networks have, the slots that they take, and why.
_SOME: dict[str, tuple[tuple[Slot, ...], str]] = {
    PACKED: (
        (Slot.SCHEDULE, Slot.GATE, Slot.GUIDER),
        "packs text, picture and sound into one sequence without rows",
    ),
    "chunk_partition": (
        (Slot.SCHEDULE, Slot.GATE),
        "makes a clip chunk by chunk, from a cache of all rows and tokens of the chunks before",
    ),
}


# An argument of pipelines that look into their network's attention at each step.
_LOOKING = ("sag_scale", "max_iter_to_alter")


def check_plan(pipe: Any, plan: Iterable[Technique]) -> None:
    """Raise a SubjectError where the pipeline lacks what a technique of the plan needs."""
    taken = inspect.signature(type(pipe).__call__).parameters
    for technique in plan:
        others = [slot.label for slot in technique.terms().slots if slot != Slot.SCHEDULE]
        if others and set(_LOOKING) & set(taken):
            raise SubjectError(
                f"{technique.name} is of the slot {others[0]}, and {type(pipe).__name__} looks into its network's "
                "attention at each step, so all of it has to run. Use a schedule, such as fewer_steps."
            )
        for network in networks(pipe):
            _check_slots(technique, network)
        technique.check(pipe)  # type: ignore[attr-defined]


def _check_slots(technique: Technique, network: nn.Module) -> None:
    kind: Any = type(getattr(network, "_orig_mod", network))
    for parameter, (slots, why) in _SOME.items():
        closed = [slot.label for slot in technique.terms().slots if slot not in slots]
        if parameter in parameters(kind) and closed:
            able = ", ".join(slot.label for slot in slots)
            raise SubjectError(
                f"{technique.name} is of the slot {closed[0]}, and {kind.__name__} takes none there: it {why}. "
                f"Use techniques of the slots {able} (`hasten list --engine denoise` shows them)."
            )


def check_call(call: Call, entries: Iterable[tuple[Technique, Any]]) -> None:
    """Raise a SubjectError where a call makes more than a picture, and something would stand for it.

    What a gate predicts and a guider leaves out is the picture alone.
    """
    for name in ("sound_tokens", "action_tokens"):
        if call.kwargs.get(name) is None:
            continue
        for technique, _ in entries:
            if {Slot.GATE, Slot.GUIDER} & set(technique.terms().slots):
                raise SubjectError(
                    f"{technique.name} leaves network calls out, and stands for their picture only; this call makes "
                    f"{name.partition('_')[0]} too. Call the pipeline without it, or use a schedule."
                )
