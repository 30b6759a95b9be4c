"""`generate`, `prepare` and `train`: the verbs that run or make models."""

from __future__ import annotations

import glob
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.call_arguments import Arguments, only_for_pipelines, read_arguments
from hasten.cli.painting import for_pipeline, paint
from hasten.cli.shared import (
    AsJson,
    BlockLength,
    Dtype,
    DtypeName,
    Guidance,
    MaxNewTokens,
    Model,
    Plans,
    Runner,
    RunnerName,
    Seed,
    Steps,
    Threads,
    at_least,
    check_seed,
    console,
    note,
    only_json,
    plan_texts,
    print_json,
    progress,
    quiet_libraries,
    read_text,
    use_threads,
    verb,
)
from hasten.errors import HastenError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hasten.subject import Subject


@verb(
    'hasten generate code-lm --prompt "def main():"',
    'hasten generate code-lm --with medusa --prompt "import os" --max-new-tokens 64',
    'hasten generate code-lm --prompt "class Stack:" --temperature 0.8 --top-p 0.95 --seed 1',
    "hasten generate code-lm --with prompt_lookup --prompt - --json < prompt.txt",
    "hasten generate code-dlm --with freedave --prompt 'def main():' --block-length 32",
    "hasten generate scenes-dit --with zeus --prompt 'a red circle' --output circle.png",
)
def generate(
    model: Model,
    prompt: Annotated[
        str,
        typer.Option(metavar="TEXT", help="The text to continue; - reads it from standard input."),
    ],
    plans: Plans = [],  # noqa: B006  (typer copies it)
    runner: Runner = RunnerName.AUTO,
    dtype: Dtype = DtypeName.AUTO,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="Above 0 samples; 0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", help="Sample among the k likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="X", help="Sample among the likeliest tokens of this mass."),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1 discourages tokens seen before.")
    ] = 1.0,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Stop after this text. Repeatable.")
    ] = None,
    block_length: BlockLength = None,
    steps: Steps = 50,
    guidance: Guidance = None,
    argument: Arguments = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where a pipeline's picture goes: .png, or .gif of a clip."
        ),
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt with a plan at work, or make a picture of it.

    Text streams to standard output as it comes.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise HastenError("The prompt is empty; give some text to continue.")
    if not all(stop or ()):
        raise HastenError("--stop is empty; give the text to stop after.")
    at_least(1, steps=steps, block_length=block_length)
    check_seed(seed)
    settings = _sampling(temperature, top_k, top_p)
    with only_json(as_json):
        quiet_libraries(as_json, model)
        use_threads(threads)
        from transformers import TextStreamer

        import hasten

        # For one call a compiler's start-up costs more than it gains, so auto is eager here.
        name = RunnerName.EAGER if runner is RunnerName.AUTO else runner
        further = read_arguments(argument)
        subject = hasten.open_subject(model, dtype=dtype.value)
        if subject.engine == "denoise":
            paint(
                subject,
                plan_texts(plans),
                text,
                output,
                as_json,
                runner=name.value,
                steps=steps,
                guidance=guidance,
                arguments=further,
                seed=seed,
            )
            return
        only_for_pipelines(subject.name, guidance=guidance, argument=argument)
        if output is not None:
            raise HastenError(f"--output is for pictures, and {subject.name} writes text.")
        tokenizer = _tokenizer_of(subject)
        if subject.engine == "masked":
            settings["block_length"] = block_length
        elif block_length is not None:
            raise HastenError(
                f"--block-length is for models that fill masks; {subject.name} reads left to right."
            )
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with hasten.apply(subject, *plan_texts(plans), runner=name.value) as fast:
            start = time.perf_counter()
            sequence = fast.generate(
                ids,
                max_new_tokens=max_new_tokens,
                repetition_penalty=repetition_penalty,
                seed=seed,
                tokenizer=tokenizer,
                stop_strings=stop or None,
                streamer=None
                if as_json
                else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
                **settings,
            )
            seconds = time.perf_counter() - start
            new = sequence[0, ids.shape[1] :].tolist()
            activity = fast.activity
    speed = len(new) / seconds
    if as_json:
        print_json(
            {
                "subject": subject.name,
                "plan": str(fast.plan),
                "runner": name.value,
                "prompt": text,
                "text": tokenizer.decode(new, skip_special_tokens=True),
                "ids": new,
                "seconds": seconds,
                "tokens_per_second": speed,
                "activity": activity,
            }
        )
    else:
        counters = ", ".join(f"{name} {value:g}" for name, value in activity.items())
        note(f"{len(new)} tokens in {seconds:.2f} s, {speed:.0f} tokens/s ({counters})")


def _sampling(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    """Arguments of `generate`; options of sampling without sampling are a mistake."""
    if temperature != 0:
        given = {"top_k": top_k, "top_p": top_p}
        chosen = {name: value for name, value in given.items() if value is not None}
        return {"do_sample": True, "temperature": temperature, **chosen}
    for name, value in (("--top-k", top_k), ("--top-p", top_p)):
        if value is not None:
            raise HastenError(f"{name} is for sampling; give --temperature above 0 too.")
    return {"do_sample": False}


def _tokenizer_of(subject: Subject) -> PreTrainedTokenizerBase:
    if subject.tokenizer is None:
        raise HastenError(
            f"{subject.name} has no tokenizer, and this verb works on text; add its tokenizer files."
        )
    return subject.tokenizer


@verb(
    "hasten prepare code-lm --with medusa",
    "hasten prepare ./my-model --with medusa --text notes.txt --text 'src/**/*.py'",
    "hasten prepare code-lm --with kv_prediction --steps 200 --seed 1 --json",
    "hasten prepare ./my-pipeline --with harmonica --text prompts.txt --sampler-steps 20 --guidance 5",
)
def prepare(
    model: Model,
    plans: Plans,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Text to learn from: a file or a wildcard. Each line is a prompt (or a class) where a "
            "pipeline learns. Repeatable. Default: Python's library, or captions of the zoo.",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help="Optimiser steps. Default: each technique's own."),
    ] = None,
    sampler_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps of a pipeline's sampler, for which the parts are. Default: the plan's.",
        ),
    ] = None,
    guidance: Guidance = None,
    argument: Arguments = None,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Train or calibrate what a plan needs for a model, and keep it where every verb finds it."""
    at_least(1, steps=steps, sampler_steps=sampler_steps)
    check_seed(seed)
    further = read_arguments(argument)
    with only_json(as_json):
        from hasten.plan import Plan

        plan = Plan.parse(*plan_texts(plans))
        if not any(technique.trained for technique in plan):
            raise HastenError(
                f"{str(plan) or 'The plan'} has nothing to prepare; it runs as it is."
            )
        documents = _documents(text) if text else []
        quiet_libraries(as_json, model)
        use_threads(threads)
        import hasten
        from hasten.denoise.call_settings import settings_of
        from hasten.parts import default_path

        subject = hasten.open_subject(model)
        if subject.engine == "denoise":
            documents = [line for each in documents for line in each.splitlines() if line.strip()]
            plan, further = for_pipeline(subject, plan, further, sampler_steps, guidance)
        else:
            only_for_pipelines(
                subject.name, sampler_steps=sampler_steps, guidance=guidance, argument=argument
            )
            _tokenizer_of(subject)
            documents = documents or _documents(None)
        with progress(as_json) as tick:
            made = hasten.prepare(
                subject,
                plan,
                texts=documents,
                arguments=further,
                steps=steps,
                seed=seed,
                tick=tick,
            )
        settings = None if subject.pipe is None else settings_of(subject.pipe, further)
        rows = [
            {
                "technique": technique.name,
                "path": default_path(technique, subject.hash, settings),
                "tensors": len(made[technique.name]),
                "parameters": sum(tensor.numel() for tensor in made[technique.name].values()),
            }
            for technique in plan
            if technique.trained
        ]
    if as_json:
        counted = {"prompts" if subject.engine == "denoise" else "documents": len(documents)}
        described = {"subject": subject.describe(), "plan": str(plan), **counted}
        print_json({**described, "prepared": rows})
        return
    for row in rows:
        print(f"{row['technique']}: {row['parameters']:,} trained values in {row['path']}")


def _documents(patterns: Sequence[str] | None) -> list[str]:
    """Texts of files and wildcards; without any, what `bench` trains missing parts on."""
    if not patterns:
        from hasten.benchmark.missing import PREPARE_BYTES
        from hasten.zoo.corpus import training_texts

        return training_texts(PREPARE_BYTES)
    documents = []
    for pattern in patterns:
        files = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not files:
            raise HastenError(f"--text {pattern} matches no file.")
        documents += [
            read_text(Path(file))
            for file in files
            if not glob.has_magic(pattern) or Path(file).is_file()
        ]
    if not any(document.strip() for document in documents):
        raise HastenError("The given text is empty; there is nothing to learn from.")
    return documents


@verb(
    "hasten train code-lm-tiny --output my-model",
    "hasten train code-lm --output my-model --threads 2",
    "hasten train code-lm --output my-model --resume",
    'hasten train code-dlm --with "repr_align(weight=0)" --output plain-conversion',
)
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A zoo recipe, such as code-lm-tiny.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the model goes. Default: your data folder."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Cut the run short; the schedule shrinks with it."),
    ] = None,
    plans: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PLAN",
            help="Techniques of training in the place of the recipe's own. Repeatable.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
    seed: Seed = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Train a zoo model again from its recipe, on Python's own library sources."""
    at_least(1, max_tokens=max_tokens, threads=threads)
    check_seed(seed)
    with only_json(as_json):
        quiet_libraries(as_json)
        from hasten.zoo import recipes
        from hasten.zoo.catalogue import user_path

        recipes.recipe(recipe)
        folder = output if output is not None else user_path(recipe)
        card = recipes.train(
            recipe,
            folder,
            threads=threads,
            max_tokens=max_tokens,
            seed=seed,
            resume=resume,
            quiet=as_json,
            plan=", ".join(plan_texts(plans)) if plans else None,
        )
    if as_json:
        print_json({"path": folder, "card": card})
        return
    quality = ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}" for name, value in card.quality.items()
    )
    console().print(
        f"{folder}: {card.num_parameters:,} parameters, {quality}", highlight=False, soft_wrap=True
    )
