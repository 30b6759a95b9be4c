"""Settings of masked techniques for tiny random models, and the lab that puts them on such models.

A technique that is not listed is tested at its defaults. Whoever adds a row says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from tests import models
from tests.lab import Lab
from tests.law_settings import SMALL, Setting
from tests.techniques.fillers import filler

GUIDE = SMALL
"""Replaced by a checkpoint: a random autoregressive model with the same tokens."""

SETTINGS: dict[str, Setting] = {
    "dinfer": Setting(
        {
            "threshold": 0.4,
            "low_threshold": 0.1,
            "threshold_decay": 0.5,
            "prefix_look": 4,
            "after_look": 4,
            "warmup_steps": 0,
        },
        "random models are hardly ever sure; texts here are short, and filled before a warm-up ends",
    ),
    "confidence_threshold": Setting({"threshold": 0.4}, "random models are hardly ever sure"),
    "freecache": Setting(
        {"guide": GUIDE, "top_k": 48, "ratio": 0.0},
        "the guide is random too, so it lets pass what is in the better half of its tokens",
    ),
}

NO_NEUTRAL: dict[str, str] = {}
"""Lossy techniques without a neutral setting, and why there is none."""


class MaskedLab(Lab):
    """As `Lab`, with models that fill masks (`fillers.filler`)."""

    settings: ClassVar[Mapping[str, Setting]] = SETTINGS

    def add(
        self,
        name: str,
        family: str = "llama",
        *,
        alphabet: str = models.CHARACTERS,
        **overrides: Any,
    ) -> str:
        """Make a model known under a name (once); `overrides` are those of `filler`."""
        if name not in self._models:
            self._models[name] = filler(family, **overrides)
            self._alphabets[name] = alphabet
        return name

    def _small(self, name: str) -> Path:
        """The guide's folder."""
        if name not in self._second:
            self._second[name] = models.save_checkpoint(self.folder / f"{name}_guide", seed=3)
        return self._second[name]
