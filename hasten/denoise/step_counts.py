"""Trained parts that hold for one number of steps, and the number of steps that is asked for."""

from __future__ import annotations

from hasten.denoise.inputs import COUNT
from hasten.errors import PlanError
from hasten.plan import Entry, Plan
from hasten.preparation import names_steps
from hasten.technique import Resource

KNOB = "steps"


def for_steps(plan: Plan, steps: int) -> Plan:
    """The plan with parts for a sampler of so many steps.

    A technique whose parts hold for one number of steps has a knob that says it. Where the plan does
    not write the knob down, it follows the sampler; `str` of the result shows it.

    Raises:
        PlanError: where the plan writes another number down.
    """
    if any(Resource.TIMESTEPS in technique.terms().changes for technique in plan):
        return plan  # the sampler makes as many steps as the plan's schedule says
    return Plan(tuple(_for_steps(entry, steps) for entry in plan.entries))


def _for_steps(entry: Entry, steps: int) -> Entry:
    technique = entry.technique
    if not names_steps(technique) or technique.knobs[KNOB] == steps:
        return entry
    if KNOB in entry.written:
        raise PlanError(
            f"{entry} is for {technique.knobs[KNOB]} steps, and the sampler makes {steps}; write "
            f"{technique.name}({KNOB}={steps}), or ask for {technique.knobs[KNOB]} steps ({COUNT})."
        )
    written = {name: technique.knobs[name] for name in entry.written}
    return Entry.make(technique.name, {**written, KNOB: steps})
