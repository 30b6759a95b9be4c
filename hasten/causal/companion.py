"""A second model beside the first: opened by name, with the same tokens, on the same device."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hasten.zoo.catalogue as zoo
from hasten.causal.runners import Runner
from hasten.errors import PlanError
from hasten.subject import Subject, open_subject

AUTO = "auto"
SMALLER = {"code-lm": "code-lm-small"}  # what "auto" means for a zoo model


@dataclass
class Companion:
    """A second model, and one runner for it of each kind that calls have used."""

    model: PreTrainedModel
    name: str
    _runners: dict[type[Runner], Runner] = field(default_factory=dict)

    def runner(self, kind: type[Runner]) -> Runner:
        """A runner like that of the first model."""
        if kind not in self._runners:
            self._runners[kind] = kind(self.model)
        return self._runners[kind]

    @property
    def context(self) -> int | None:
        """The longest sequence that it was made for, if it says."""
        return Subject(self.model, self.name).context


def open_companion(model: PreTrainedModel, wanted: str, *, technique: str, knob: str) -> Companion:
    """Open the model that a knob names, in the first one's dtype and on its device.

    Args:
        wanted: zoo name, checkpoint folder or hub id; "auto" takes the zoo's smaller sibling.
        technique: name of the technique that asks and `knob` the name of its knob, for errors.

    Raises:
        PlanError: where "auto" knows no sibling, the second model does not read from left to right, or
            the two do not share their tokens.
        SubjectError: where the second model cannot be opened.
    """
    name = _sibling(model, technique, knob) if wanted == AUTO else wanted
    subject = open_subject(name, dtype=model.dtype, device=model.device)
    if subject.engine != "causal":
        raise PlanError(
            f"{technique}: {name} runs on the {subject.engine} engine; {knob} must read from left to right. "
            "Name an autoregressive model."
        )
    _check_vocabulary(model, subject, technique)
    return Companion(subject.model, name)


def _sibling(model: PreTrainedModel, technique: str, knob: str) -> str:
    """The zoo's smaller model for this one, which must be a zoo model itself."""
    folder = Path(model.name_or_path or "").absolute()
    for name, smaller in SMALLER.items():
        if zoo.is_zoo_name(name) and folder == zoo.path(name).absolute():
            if zoo.is_zoo_name(smaller):
                return smaller
            raise PlanError(
                f"{technique}: {smaller}, the smaller sibling of {name}, is not here; train it first."
            )
    raise PlanError(
        f"{technique}: {knob}='{AUTO}' knows a smaller model only for {' and '.join(SMALLER)}; "
        f'name one with the same tokenizer: {technique}({knob}="folder").'
    )


def _check_vocabulary(model: PreTrainedModel, second: Subject, technique: str) -> None:
    """Refuse a second model that speaks other tokens."""
    ours, theirs = (
        m.config.get_text_config(decoder=True).vocab_size for m in (model, second.model)
    )
    if ours != theirs:
        raise PlanError(
            f"{technique}: {second.name} has a vocabulary of {theirs} tokens and the model one of {ours}; "
            "name a model with the same tokenizer."
        )
    own = own_tokenizer(model)
    if (
        own is not None
        and second.tokenizer is not None
        and own.get_vocab() != second.tokenizer.get_vocab()
    ):
        raise PlanError(
            f"{technique}: {second.name} has another tokenizer than the model (as many tokens, but "
            "different ones); name a model with the same tokenizer."
        )


def own_tokenizer(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the model on disk, if it came from there."""
    if not model.name_or_path:
        return None
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None
