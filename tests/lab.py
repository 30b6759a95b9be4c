"""Puts techniques on tiny models for the laws: settings, trained parts and second models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hasten
from hasten import technique as registry
from hasten.causal.engine import CausalModel
from hasten.parts import part_knobs
from hasten.technique import Parts, Technique
from tests import models
from tests.law_settings import SETTINGS, SMALL

PREPARE_STEPS = 2
NOISE = 0.01  # on the second model's weights, so that it is often but not always right


class Lab:
    """Tiny models by name, and techniques on them; what is trained or saved is kept.

    A name is a family with config overrides, such as `("llama", {"num_key_value_heads": 4})`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._models: dict[str, PreTrainedModel] = {}
        self._second: dict[str, Path] = {}
        self._parts: dict[tuple[str, str, str], Parts] = {}
        self._alphabets: dict[str, str] = {}
        self._outputs: dict[tuple[str, str, str], Tensor] = {}

    def add(
        self,
        name: str,
        family: str = "llama",
        *,
        alphabet: str = models.CHARACTERS,
        **overrides: Any,
    ) -> str:
        """Make a model known under a name (once)."""
        if name not in self._models:
            self._models[name] = models.tiny_model(family, **overrides)
            self._alphabets[name] = alphabet
        return name

    def model(self, name: str) -> PreTrainedModel:
        return self._models[name]

    def technique(self, name: str, slug: str, *, neutral: bool = False) -> Technique:
        """A technique at the laws' setting for a model, or at its neutral knobs."""
        kind = registry.get(slug)
        knobs = dict(SETTINGS[slug].knobs) if slug in SETTINGS else {}
        if neutral:
            assert kind.card.neutral is not None
            knobs |= kind.card.neutral
        return kind(**{k: str(self._small(name)) if v == SMALL else v for k, v in knobs.items()})

    def parts(self, name: str, technique: Technique) -> dict[str, Parts]:
        """Parts of a technique, trained for two steps if it is a trained one."""
        if not technique.card.trained:
            return {}
        key = (name, technique.name, str(part_knobs(technique)))
        if key not in self._parts:
            usual = self.technique(name, technique.name)
            if part_knobs(usual) == part_knobs(technique):
                technique = usual  # whichever knobs came first, the parts are the same
            with torch.random.fork_rng():
                made = hasten.prepare(
                    self._models[name],
                    technique,
                    texts=models.texts(),
                    steps=PREPARE_STEPS,
                    tokenizer=models.tiny_tokenizer(self._alphabets[name]),
                    write=False,
                )
            self._parts[key] = made[technique.name]
        return {technique.name: self._parts[key]}

    def apply(self, name: str, *techniques: Technique, **options: Any) -> CausalModel:
        """A plan on a model; use it as a context, so that it is undone."""
        parts: dict[str, Parts] = {}
        for technique in techniques:
            parts |= self.parts(name, technique)
        tokenizer = models.tiny_tokenizer(self._alphabets[name])
        return hasten.apply(
            self._models[name], *techniques, parts=parts, tokenizer=tokenizer, **options
        )

    def plain(self, name: str, inputs: dict[str, Tensor], **arguments: Any) -> Tensor:
        """Output of the empty plan."""
        with self.apply(name) as fast:
            return fast.generate(**inputs, **arguments)

    def plain_kept(self, name: str, inputs: dict[str, Tensor], **arguments: Any) -> Tensor:
        """As `plain`, for calls that many tests repeat."""
        key = (name, str(inputs), str(arguments))
        if key not in self._outputs:
            self._outputs[key] = self.plain(name, inputs, **arguments)
        return self._outputs[key]

    def _small(self, name: str) -> Path:
        """The second model's folder."""
        if name not in self._second:
            model = self._models[name]
            state = {key: value.clone() for key, value in model.state_dict().items()}
            generator = torch.Generator().manual_seed(7)
            noisy = {
                key: value + NOISE * torch.randn(value.shape, generator=generator).to(value.dtype)
                for key, value in state.items()
            }
            folder = self.folder / f"{name}_small"
            model.save_pretrained(folder, state_dict=noisy)
            models.tiny_tokenizer(self._alphabets[name]).save_pretrained(folder)
            self._second[name] = folder
        return self._second[name]


def counters(fast: CausalModel, slug: str) -> dict[str, float]:
    """A technique's own activity in the last call."""
    return {key: value for key, value in fast.activity.items() if key.startswith(f"{slug}.")}
