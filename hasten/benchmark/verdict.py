"""The word at the end of a row, and its reason."""

from __future__ import annotations

from typing import Any

from hasten.measure.ceilings import Ceiling
from hasten.measure.clock import Ratio
from hasten.plan import Plan
from hasten.technique import Loss

CLASSES = tuple(Loss)  # from the strictest on
ATTEMPTS = ("drafted",)  # counters of what was tried; a technique is at work if others move


def loss_of(plan: Plan) -> Loss:
    """The loosest class among the plan's techniques, which is the plan's own."""
    classes = (technique.loss_class() for technique in plan)
    return max(classes, key=CLASSES.index, default=Loss.EXACT)


def claims_of(plan: Plan) -> list[dict[str, Any]]:
    """What the papers of the plan's techniques claim, cited."""
    return [
        {"technique": t.name, "what": c.what, "value": c.value, "where": c.where}
        for t in plan
        for c in t.card.claims
    ]


def own_activity(plan: Plan, activity: dict[str, float]) -> dict[str, float]:
    """The counters that the plan's techniques moved (the loop's own are left out)."""
    names = [technique.name for technique in plan]
    return {
        key: value
        for key, value in activity.items()
        if key.split(".", 1)[0] in names and "." in key
    }


def verdict(
    plan: Plan, ratio: Ratio, activity: dict[str, float], proof: dict[str, Any], ceiling: Ceiling
) -> tuple[str, str]:
    """("faster" | "no gain" | "inactive" | "broken", the reason in one sentence)."""
    if not proof["passed"]:
        return "broken", f"it does not keep to its class: {proof['detail']}"
    moved = own_activity(plan, activity)
    idle = [
        technique.name
        for technique in plan
        if not any(
            count
            for key, count in moved.items()
            if key.split(".")[0] == technique.name and not key.endswith(ATTEMPTS)
        )
    ]
    if idle:
        return "inactive", f"{', '.join(idle)} did nothing on this workload" + (
            f": {ceiling.detail}" if ceiling.value <= 1 else ""
        )
    if ratio.is_faster:
        return "faster", f"the whole interval lies above 1; {ceiling.detail}"
    return "no gain", _why(plan, ratio, activity, ceiling)


def _why(plan: Plan, ratio: Ratio, activity: dict[str, float], ceiling: Ceiling) -> str:
    """Which term of the ceiling was missed."""
    if ceiling.value < 1.1:
        return f"there is next to nothing to gain here: {ceiling.detail}"
    if ratio.median > 1:
        return f"the gain is within the noise of the measurement; {ceiling.detail}"
    passes, emitted = activity.get("passes", 0), activity.get("emitted", 0)
    if ceiling.term == "passes" and passes:
        rate = emitted / passes
        return (
            f"{rate:.2f} tokens a pass, but a pass over {activity.get('positions', 0) / passes:.1f} positions "
            f"and drafting cost more than they save; {ceiling.detail}"
        )
    certain = "slower" if ratio.is_slower else "not clearly faster"
    return f"{certain}: what is saved is less than the technique's own work; {ceiling.detail}"
