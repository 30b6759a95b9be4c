"""Where a technique's defaults say nothing on a tiny random model: the one table of other settings.

A technique that is not listed is tested at its defaults. Whoever adds a row says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SMALL = "<folder of the second model>"
"""Replaced by a checkpoint: the tested model with a little noise on its weights."""


@dataclass(frozen=True)
class Setting:
    """Knobs for the laws, and the reason for them."""

    knobs: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


SETTINGS: dict[str, Setting] = {
    "a_star_decoding": Setting(
        {"scorer": "likelihood", "step_border": "", "max_step": 4, "max_tokens": 60},
        "random text is no Python and has hardly a line's end",
    ),
    "draft_model": Setting({"draft": SMALL}, "the second model"),
    "entropy_adaptive_decoding": Setting(
        {"small": SMALL, "threshold": 5.3, "window": 2, "min_run": 2},
        "the second model; random models are never sure, and prompts here are short",
    ),
    "lexical_unit_decoding": Setting(
        {"threshold": 0.0}, "hardly trained placeholders are never sure of anything"
    ),
    "prompt_lookup": Setting({"min_ngram": 1}, "random text hardly repeats two tokens"),
}

NO_NEUTRAL: dict[str, str] = {
    "kv_prediction": "the auxiliary model always writes the prompt's cache",
}
"""Lossy techniques without a neutral setting, and why there is none."""
