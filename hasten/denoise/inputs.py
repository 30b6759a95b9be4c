"""What a Diffusers pipeline is called with, for prompts of whatever kind it takes."""

from __future__ import annotations

import difflib
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hasten.denoise.network import networks
from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.subject import Subject

COUNT = "num_inference_steps"
MOST_STEPS = 1000  # of any sampler; many a scheduler would fill the memory before it refuses more
SIZES = ("height", "width", "num_frames")


def call_arguments(pipe: Any, prompts: Sequence[Any], **given: Any) -> dict[str, Any]:
    """Arguments of a pipeline's call that makes one picture or clip of each prompt.

    Args:
        prompts: texts; names or numbers of classes for a pipeline that takes those.
        given: further arguments; one that the pipeline does not take is an error, but
            `output_type` is left out then.

    Raises:
        HastenError: where the pipeline takes neither prompts nor classes, or not an argument.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    if "output_type" not in taken:
        given.pop("output_type", None)
    check_arguments(pipe, given)
    if isinstance(given.get("negative_prompt"), str):  # some want a list where prompts are one
        given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
    if "prompt" in taken:
        return {"prompt": [str(prompt) for prompt in prompts], **given}
    if "class_labels" in taken:
        return {"class_labels": [class_of(pipe, prompt) for prompt in prompts], **given}
    raise HastenError(
        f"{type(pipe).__name__} takes neither a prompt nor class_labels, so hasten cannot call it by itself; "
        "use hasten.apply(pipe, ...) and call it with its own arguments."
    )


# ------------------------------------------------------------------------------------- checks
def check_arguments(pipe: Any, given: Mapping[str, Any]) -> None:
    """Raise a HastenError for an argument that a pipeline does not take, or a size that is none."""
    kind, taken = type(pipe).__name__, list(inspect.signature(type(pipe).__call__).parameters)[1:]
    for name, value in given.items():
        if name not in taken:
            near = difflib.get_close_matches(name, taken, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise HastenError(
                f"{kind} takes no argument {name!r}.{hint} It takes: {', '.join(taken)}."
            )
        if name in SIZES and value is not None and not _is_count(value):
            raise HastenError(f"{name}={value!r}; it must be a whole number of 1 or more.")
    if given.get(COUNT) is not None:
        check_steps(pipe, given[COUNT])


def check_steps(pipe: Any, steps: Any) -> None:
    """Raise a HastenError for a number of steps that no sampler of this scheduler makes."""
    config = getattr(pipe.scheduler, "config", {})
    most = int(config.get("num_train_timesteps") or MOST_STEPS)
    if not _is_count(steps) or steps > most:
        raise HastenError(
            f"{COUNT}={steps!r} is out of range for {type(pipe.scheduler).__name__}; allowed is 1 to {most}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@contextmanager
def refusals(pipe: Any) -> Iterator[None]:
    """Say in one line what a pipeline itself refuses, such as a size that its patches do not divide.

    Diffusers looks at a call's arguments once the call is made, and raises errors of Python's own.

    Raises:
        HastenError: in the place of a ValueError or TypeError that a pipeline or scheduler raises.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        where = str(frame.f_globals.get("__name__"))
        if not where.startswith(("diffusers.pipelines", "diffusers.schedulers")):
            raise
        words = " ".join(str(error).replace("`", "").split()).rstrip(".") or type(error).__name__
        raise HastenError(f"{type(pipe).__name__} refuses this call: {words}.") from error


# ------------------------------------------------------------------------------------- prompts
def own_prompts(subject: Subject, count: int = 256) -> list[str]:
    """Captions such as a model of the zoo was trained on, never held-out ones; none for others."""
    import hasten.zoo.catalogue as zoo

    if not zoo.is_zoo_name(subject.name) or not subject.name.startswith("scenes-"):
        return []
    from hasten.zoo.scenes import caption, draw_many

    frames = int(zoo.card(subject.name)["recipe"].get("frames", 1))
    scenes = draw_many(count, 0, frames=frames)
    return [caption(scene, moving=frames > 1) for scene in scenes]


def takes_classes(pipe: Any) -> bool:
    """Whether a pipeline makes pictures of classes, and reads no prompt."""
    taken = inspect.signature(type(pipe).__call__).parameters
    return "class_labels" in taken and "prompt" not in taken


def num_classes(pipe: Any) -> int:
    """How many classes a pipeline's network knows."""
    config = getattr(networks(pipe)[0], "config", {})
    return int(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 1000)


def class_of(pipe: Any, prompt: Any) -> int:
    """The number of a class that is given by number or name.

    Raises:
        HastenError: where there is no such class.
    """
    labels, count = getattr(pipe, "labels", None) or {}, num_classes(pipe)
    if isinstance(prompt, int) or str(prompt).isdigit():
        if 0 <= int(prompt) < count:
            return int(prompt)
    elif prompt in labels:
        return int(labels[prompt])
    names = f", or a name such as {', '.join(list(labels)[:3])}" if labels else ""
    raise HastenError(
        f"{prompt!r} is no class of this {type(pipe).__name__}; give a number from 0 to {count - 1}{names}."
    )
