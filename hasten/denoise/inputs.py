"""What a Diffusers pipeline is called with, for prompts of whatever kind it takes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.subject import Subject


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
    if isinstance(given.get("negative_prompt"), str):  # some want a list where prompts are one
        given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
    if "prompt" in taken:
        return {"prompt": [str(prompt) for prompt in prompts], **given}
    if "class_labels" in taken:
        return {"class_labels": [_class_of(pipe, prompt) for prompt in prompts], **given}
    raise HastenError(
        f"{kind} takes neither a prompt nor class_labels; hasten can only prepare for pipelines that do."
    )


def own_prompts(subject: Subject, count: int = 256) -> list[str]:
    """Captions such as a model of the zoo was trained on, never held-out ones; none for others."""
    import hasten.zoo.catalogue as zoo

    if not zoo.is_zoo_name(subject.name) or not subject.name.startswith("scenes-"):
        return []
    from hasten.zoo.scenes import caption, draw_many

    frames = int(zoo.card(subject.name)["recipe"].get("frames", 1))
    scenes = draw_many(count, 0, frames=frames)
    return [caption(scene, moving=frames > 1) for scene in scenes]


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
