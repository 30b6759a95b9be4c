"""What a Diffusers pipeline is called with, for prompts of whatever kind it takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from hasten.errors import HastenError


def call_arguments(pipe: Any, prompts: Sequence[Any], **given: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call that makes one picture or clip of each prompt.

    Args:
        prompts: texts; names or numbers of classes for a pipeline that takes those.
        given: further arguments; one that the pipeline does not take is an error, but
            `output_type` is left out then.

    Raises:
        HastenError: where the pipeline takes neither prompts nor classes, or not an argument.
    """
    kind = type(pipe).__name__
    taken = inspect.signature(type(pipe).__call__).parameters
    if "output_type" not in taken:
        given.pop("output_type", None)
    for name in given:
        if name not in taken:
            raise HastenError(f"{kind} takes no argument {name!r}; it takes {', '.join(taken)}.")
    if "prompt" in taken:
        return {"prompt": [str(prompt) for prompt in prompts], **given}
    if "class_labels" in taken:
        return {"class_labels": [_class_of(pipe, prompt) for prompt in prompts], **given}
    raise HastenError(
        f"{kind} takes neither a prompt nor class_labels; hasten can only prepare for pipelines that do."
    )


def _class_of(pipe: Any, prompt: Any) -> int:
    if isinstance(prompt, int) or str(prompt).isdigit():
        return int(prompt)
    labels = getattr(pipe, "labels", None) or {}
    if prompt not in labels:
        raise HastenError(
            f"{prompt!r} is no class of this {type(pipe).__name__}; give its number, or a name such as "
            f"{', '.join(list(labels)[:3]) or '(it has no names)'}."
        )
    return int(labels[prompt])
