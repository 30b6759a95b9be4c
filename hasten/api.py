"""The verbs in Python: open, apply, prepare."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from hasten.causal.engine import CausalModel
from hasten.causal.engine import prepare as prepare_causal
from hasten.parts import default_path, save
from hasten.plan import Plan
from hasten.prepare import Preparation, Tick, _no_tick
from hasten.subject import Subject, open_subject
from hasten.technique import Parts, Technique

Model = str | os.PathLike[str] | nn.Module | Subject


def apply(
    model: Model,
    *plan: str | Plan | Technique,
    runner: str = "eager",
    parts: dict[str, Parts] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> CausalModel:
    """Put a plan on a model.

    Args:
        model: a zoo name, a checkpoint folder, a hub id, or a live transformers model.
        plan: technique names with knobs, such as "medusa" or "prefix_kv(budget=0.3)".
        runner: what executes the passes.
        parts: trained parts by technique; by default those on disk for this model are used.
        options: as `open_subject`.

    Raises:
        PlanError: where the plan is no plan, clashes, or lacks a trained part.
        SubjectError: where the model cannot be opened or run.
    """
    parsed = Plan.parse(*plan)
    subject = open_subject(model, tokenizer=tokenizer, **options)
    return CausalModel(subject, parsed, runner=runner, parts=parts)


def prepare(
    model: Model,
    *plan: str | Plan | Technique,
    texts: Sequence[str],
    steps: int | None = None,
    seed: int = 0,
    tick: Tick = _no_tick,
    tokenizer: PreTrainedTokenizerBase | None = None,
    write: bool = True,
) -> dict[str, Parts]:
    """Train or calibrate what the plan's techniques need for this model.

    Args:
        texts: documents to learn from.
        steps: optimiser steps; None takes each technique's own default.
        write: also save the parts in the user's data folder, where `apply` finds them.
    """
    parsed = Plan.parse(*plan)
    subject = open_subject(model, tokenizer=tokenizer)
    made = prepare_causal(subject, parsed, Preparation(subject, list(texts), steps, seed, tick))
    if write:
        for technique in parsed:
            if technique.name in made:
                save(default_path(technique, subject.hash), technique, made[technique.name], subject.hash)
    return made
