"""The verbs in Python: apply, prepare, save, load (bench stands in hasten.benchmark)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hasten.causal.engine import CausalModel
from hasten.denoise.call_settings import settings_of
from hasten.denoise.engine import DenoiseModel
from hasten.denoise.inputs import COUNT, own_prompts, refusals
from hasten.denoise.pipelines import quiet
from hasten.denoise.step_counts import for_steps
from hasten.denoise.suits import check_plan
from hasten.errors import PlanError
from hasten.home import atomic_write
from hasten.masked.engine import MaskedModel
from hasten.parts import default_path
from hasten.parts import load as load_part
from hasten.parts import save as save_part
from hasten.plan import Plan
from hasten.preparation import Preparation, Tick, _no_tick
from hasten.preparation import prepare as prepare_parts
from hasten.subject import Subject, open_subject
from hasten.technique import Parts, Technique

PLAN_FILE = "plan.toml"

Applied = CausalModel | MaskedModel | DenoiseModel

ENGINES: Mapping[str, Callable[..., Applied]] = {
    "causal": CausalModel,
    "denoise": DenoiseModel,
    "masked": MaskedModel,
}

Model = Any  # str | os.PathLike[str] | nn.Module | Subject | a Diffusers pipeline


def apply(
    model: Model,
    *plan: str | Plan | Technique,
    runner: str = "eager",
    parts: dict[str, Parts] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> Applied:
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
    return put(subject, parsed, runner=runner, parts=parts)


def put(
    subject: Subject, plan: Plan, *, runner: str = "eager", parts: dict[str, Parts] | None = None
) -> Applied:
    """Put a plan on an open subject, by the engine that runs it."""
    check_engine(subject, plan)
    return ENGINES[subject.engine](subject, plan, runner=runner, parts=parts)


def check_engine(subject: Subject, plan: Plan) -> None:
    """Raise where a technique belongs to another engine than the subject."""
    for technique in plan:
        engines = {slot.engine for slot in technique.contract.slots}
        if subject.engine not in engines:
            theirs = min(engines)
            raise PlanError(
                f"{technique.name} is of the {theirs} engine, and {subject.name} runs on the "
                f"{subject.engine} one; `hasten list --engine {subject.engine}` shows what fits."
                f"{_hint(theirs, subject.engine)}"
            )


def _hint(theirs: str, engine: str) -> str:
    """What may have been meant, where a technique's engine is not the subject's."""
    if theirs == "training":
        return " It acts while a model is made: `hasten train RECIPE --with ...`."
    if (theirs, engine) == ("masked", "causal"):
        return (
            " A model that fills masks says so in its config.json: is_causal false, and "
            "mask_token_id."
        )
    return ""


def prepare(
    model: Model,
    *plan: str | Plan | Technique,
    texts: Sequence[str] = (),
    prompts: Sequence[Any] = (),
    arguments: Mapping[str, Any] | None = None,
    steps: int | None = None,
    seed: int = 0,
    tick: Tick = _no_tick,
    tokenizer: PreTrainedTokenizerBase | None = None,
    write: bool = True,
) -> dict[str, Parts]:
    """Train or calibrate what the plan's techniques need for this model.

    Args:
        texts: documents that a language model learns from.
        prompts: what a Diffusers pipeline learns from: texts, or classes. By default `texts`, or for
            a model of the zoo captions like those that it learned from.
        arguments: further arguments of a pipeline's call, such as its size, guidance scale or number
            of steps (`num_inference_steps`). Parts that depend on them serve such calls only.
        steps: optimiser steps; None takes each technique's own default.
        write: also save the parts in the user's data folder, where `apply` finds them.

    Raises:
        HastenError: where text or prompts are missing, or the pipeline refuses the arguments.
    """
    parsed = Plan.parse(*plan)
    subject = open_subject(model, tokenizer=tokenizer)
    check_engine(subject, parsed)
    if subject.pipe is not None:
        check_plan(subject.pipe, parsed)
    if arguments and arguments.get(COUNT) is not None:
        parsed = for_steps(parsed, arguments[COUNT])
    preparation = Preparation(
        subject,
        list(texts),
        steps,
        seed,
        tick,
        prompts=list(prompts or texts or own_prompts(subject)),
        arguments=dict(arguments or {}),
    )
    with ExitStack() as stack:
        if subject.pipe is not None:
            stack.enter_context(quiet(subject.pipe))
            stack.enter_context(refusals(subject.pipe))
        made = prepare_parts(parsed, preparation)
    if write:
        settings = None if subject.pipe is None else settings_of(subject.pipe, arguments or {})
        for technique in parsed:
            if technique.name in made:
                path = default_path(technique, subject.hash, settings)
                save_part(path, technique, made[technique.name], subject.hash, settings)
    return made


def save(applied: Applied, folder: str | os.PathLike[str]) -> Path:
    """Write a plan and its trained parts: `plan.toml` and one safetensors file per trained technique.

    The model itself is not copied; the parts carry its hash, and `load` refuses any other.
    """
    place = Path(folder)
    for technique in applied.plan:
        if applied.parts[technique.name]:
            path = place / f"{technique.name}.safetensors"
            save_part(path, technique, applied.parts[technique.name], applied.subject.hash)
    # Written last: a folder without it was not finished.
    return atomic_write(place / PLAN_FILE, applied.plan.to_toml())


def load(
    folder: str | os.PathLike[str], model: Model, *, runner: str = "eager", **options: Any
) -> Applied:
    """Put a saved plan on a model, with the parts that were saved with it.

    Raises:
        PlanError: where the folder holds no plan, or its parts belong to another model.
    """
    place = Path(folder)
    if not (place / PLAN_FILE).is_file():
        raise PlanError(f"{place} holds no {PLAN_FILE}; give a folder that hasten.save wrote.")
    plan = Plan.load(place / PLAN_FILE)
    subject = open_subject(model, **options)
    parts: dict[str, Parts] = {}
    for technique in plan:
        path = place / f"{technique.name}.safetensors"
        if technique.trained or path.is_file():
            parts[technique.name] = load_part(path, technique, subject.hash)
    return put(subject, plan, runner=runner, parts=parts)
