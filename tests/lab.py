"""What the laws of all engines share: techniques on tiny models, and looks at what they leave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hasten
from hasten import technique as registry
from hasten.causal.engine import CausalModel
from hasten.errors import PlanError
from hasten.masked.engine import MaskedModel
from hasten.parts import part_knobs
from hasten.plan import Plan, conflict
from hasten.technique import Knob, Loss, Parts, Technique
from tests import models
from tests.law_settings import SETTINGS, SMALL, Setting

PREPARE_STEPS = 2
NOISE = 0.01  # on the second model's weights, so that it is often but not always right


class Lab:
    """Tiny models by name, and techniques on them; what is trained or saved is kept.

    A name is a family with config overrides, such as `("llama", {"num_key_value_heads": 4})`.
    """

    settings: ClassVar[Mapping[str, Setting]] = SETTINGS

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

    def technique(self, name: str, slug: str, *, neutral: bool = False, **more: Any) -> Technique:
        """A technique at the laws' setting for a model, with more knobs, or at its neutral ones."""
        kind = registry.get(slug)
        knobs = {**self.settings[slug].knobs, **more} if slug in self.settings else more
        if neutral:
            assert kind.card.neutral is not None
            knobs = {**knobs, **kind.card.neutral}
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


def says_what_it_is(slug: str, engine: str, no_neutral: Collection[str]) -> None:
    """A technique's card, contract and knobs are filled in."""
    kind = registry.get(slug)
    assert kind.name == slug
    assert kind.__doc__ and kind.card.title and kind.card.family
    assert kind.card.loss in Loss and kind.contract.slots
    assert kind().loss_class() is kind.card.loss
    assert {slot.engine for slot in kind.contract.slots} == {engine}
    knobs = dataclasses.fields(kind)  # type: ignore[arg-type]
    for knob in knobs:
        assert knob.metadata["knob"].help, f"{slug}.{knob.name} says nothing of itself"
    assert set(kind.part_knobs) <= {knob.name for knob in knobs}
    kind(**(kind.card.neutral or {}))
    exempt = kind.card.loss is not Loss.LOSSY or slug in no_neutral
    assert kind.card.neutral is not None or exempt, f"{slug} is lossy and has no neutral setting"
    assert not (kind.card.neutral and slug in no_neutral)


def rival_can_be_read(slug: str, engine: str) -> None:
    """The rival on a technique's card is a plan of the same engine, with a reason."""
    kind = registry.get(slug)
    if kind.card.rival is not None:
        text = kind.card.rival.plan.format(**kind().knobs)
        plan = Plan.parse(text)
        assert text != slug and kind.card.rival.metric and kind.card.rival.why
        assert {slot.engine for t in plan for slot in t.contract.slots} <= {engine}


def survives_text_and_toml(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    assert Plan.from_toml(plan.to_toml()) == plan
    assert str(Plan.from_toml(plan.to_toml())) == str(plan)


def refused_together(first: Technique, second: Technique) -> None:
    """One line that names both, what they clash on, and what to do; in either order."""
    for one, other in ((first, second), (second, first)):
        with pytest.raises(PlanError) as caught:
            Plan.parse(one, other)
        message = str(caught.value)
        assert "\n" not in message and one.name in message and other.name in message
        assert "leave one of them out" in message
        ours, theirs = one.terms(), other.terms()
        slots = {repr(slot.label) for slot in set(ours.slots) & set(theirs.slots) if slot.exclusive}
        resources = {r.value for r in (ours.needs & theirs.changes) | (theirs.needs & ours.changes)}
        assert any(name in message for name in slots | resources)


def verdict_without_names(first: Technique, second: Technique) -> bool:
    """Whether two techniques may stand together when both are called something else."""

    def renamed(technique: Technique, name: str) -> Technique:
        return type(name, (type(technique),), {"name": name})(**technique.knobs)

    return conflict(renamed(first, "one"), renamed(second, "two")) is None


def counters(fast: CausalModel | MaskedModel, slug: str) -> dict[str, float]:
    """A technique's own activity in the last call."""
    return {key: value for key, value in fast.activity.items() if key.startswith(f"{slug}.")}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def hooks(model: nn.Module) -> list[tuple[str, str]]:
    """Every hook and every forward that was put over a module's own."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [
        (name, kind)
        for name, module in model.named_modules()
        for kind in (*kinds, "forward")
        if (module.__dict__.get(kind) if kind != "forward" else kind in module.__dict__)
    ]


def early_end(ids: Tensor, prompt: int) -> int:
    """An id that some rows of a continuation meet early, and others late or never."""
    firsts: dict[int, list[int]] = {}
    for row in ids[:, prompt:].tolist():
        for token in set(row):
            firsts.setdefault(token, []).append(row.index(token))
    return min(firsts, key=lambda token: (abs(min(firsts[token]) - 4), len(firsts[token])))


def padded_behind(row: Tensor, prompt: int, end: int) -> bool:
    """Whether a continuation holds its end-of-text id once at most, and only padding behind it."""
    rest = row[prompt:].tolist()
    return end not in rest or all(token == models.EOS for token in rest[rest.index(end) + 1 :])


def other_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """A legal value of a knob that is not its default."""
    limits: Knob = field.metadata["knob"]
    if limits.choices:
        return next(choice for choice in limits.choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return 'a "quoted" \\ name, with(out) brackets'
    low = -10.0 if limits.low is None else limits.low
    high = max(low + 1, 10.0) if limits.high is None or math.isinf(limits.high) else limits.high
    middle = low + (high - low) / 4
    if isinstance(value, int):
        return next(n for n in (math.ceil(middle), math.ceil(middle) + 1) if n != value)
    return middle if middle != value else low + (high - low) / 8


def one_knob_plans(slug: str) -> list[Plan]:
    """A technique at its defaults, and with each knob at another value."""
    kind = registry.get(slug)
    plans = [Plan.parse(slug)]
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        try:
            plans.append(Plan.parse(kind(**{field.name: other_value(field, field.default)})))
        except PlanError as error:  # a knob that is checked against another one
            assert slug in str(error)
    assert len(plans) > 1 or not dataclasses.fields(kind)  # type: ignore[arg-type]
    return plans
