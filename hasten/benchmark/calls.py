"""The calls of a pipeline that a benchmark makes, and what parts are trained on for them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.denoise.engine import DenoiseModel
from hasten.denoise.inputs import (
    COUNT,
    call_arguments,
    check_arguments,
    check_steps,
    num_classes,
    own_prompts,
    takes_classes,
)
from hasten.errors import HastenError
from hasten.subject import Subject
from hasten.zoo import catalogue

Array = NDArray[np.float64]

# What somebody who gives no prompt to a pipeline that we know nothing of gets.
PLAIN_PROMPTS = (
    "a red apple on a wooden table",
    "a small boat on a calm lake at sunrise",
    "a cat asleep on a blue chair",
    "an old stone bridge over a river",
)
# What its parts are trained on: never what it is then measured with.
TRAINING_PROMPTS = (
    "a green bicycle against a brick wall",
    "two children flying a kite on a beach",
    "a bowl of soup with bread beside it",
    "a snowy mountain under a clear sky",
    "a brown dog running through tall grass",
    "a city street at night in the rain",
    "a vase of yellow flowers by a window",
    "a steam train crossing a wide plain",
)
NUM_CLASSES = 8  # that are measured with, and as many others that are trained on

SET_HERE = {
    "prompt": "the prompts",
    "class_labels": "the prompts",
    COUNT: "the number of steps",
    "generator": "the seed",
    "num_images_per_prompt": "the number of pictures",
    "num_videos_per_prompt": "the number of pictures",
    "output_type": "what is done with the pictures",
    "return_dict": "what is done with the pictures",
}
"""Arguments of a call that are not the user's to give, and what they follow from."""


@dataclass(frozen=True)
class Picture:
    """One picture to make: the arguments of the pipeline's call, and the seed of its noise."""

    arguments: dict[str, Any]
    seed: int

    def call(self, model: DenoiseModel) -> Array:
        """(1, [frames,] height, width, channels) values from 0 to 1."""
        generator = torch.Generator().manual_seed(self.seed)
        made = model(**self.arguments, generator=generator, output_type="np", return_dict=False)[0]
        found: Array = np.asarray(made, dtype=np.float64)
        return found

    def check_size(self, made: Array, kind: str) -> None:
        """Raise a HastenError where a pipeline of this kind made a picture of another size."""
        for name, size in zip(("height", "width"), made.shape[-3:-1], strict=True):
            asked = self.arguments.get(name)
            if asked is not None and asked != size:
                raise HastenError(
                    f"{kind} makes a {name} of {size} where {asked} is asked for; ask for one that it makes as it is."
                )


def arguments_of(pipe: Any, prompt: str, steps: int, guidance: float | None) -> dict[str, Any]:
    """The arguments with which a pipeline makes one picture of a prompt.

    Raises:
        HastenError: where a pipeline takes neither prompts nor classes, no guidance scale, or not so
            many steps.
    """
    found = call_arguments(pipe, [prompt], **{COUNT: steps}, **guided(pipe, guidance))
    return found | ({"prompt": prompt} if "prompt" in found else {})


def guided(pipe: Any, guidance: float | None) -> dict[str, float]:
    """A guidance scale as an argument of a pipeline's call; none where none is asked for."""
    if guidance is None:
        return {}
    if "guidance_scale" not in inspect.signature(type(pipe).__call__).parameters:
        raise HastenError(f"{type(pipe).__name__} takes no guidance_scale; leave --guidance out.")
    if not math.isfinite(guidance):
        raise HastenError(f"guidance={guidance}; it must be a finite number.")
    return {"guidance_scale": guidance}


def usual_arguments(subject: Subject) -> dict[str, Any]:
    """The arguments that show a model of the zoo at its best, from its card; none for any other."""
    if not catalogue.is_zoo_name(subject.name):
        return {}
    return dict(catalogue.card(subject.name).get("sampling", {}))


def check_given(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise a HastenError for further arguments that are none, or not the user's to give."""
    for name in arguments:
        if name in SET_HERE:
            raise HastenError(
                f"hasten sets the argument {name!r} itself, from {SET_HERE[name]}; leave it out of the arguments."
            )
    check_arguments(pipe, arguments)


def pictures_of(
    subject: Subject,
    texts: list[str],
    count: int,
    *,
    steps: int,
    guidance: float | None,
    arguments: Mapping[str, Any],
    seed: int,
) -> list[Picture]:
    """So many pictures of these texts in turns, each from a noise of its own.

    Raises:
        HastenError: for arguments that the pipeline does not take or a benchmark sets itself.
    """
    check_given(subject.pipe, arguments)
    check_steps(subject.pipe, steps)
    usual = usual_arguments(subject) | dict(arguments)
    return [
        Picture(
            usual | arguments_of(subject.pipe, texts[i % len(texts)], steps, guidance), seed + i
        )
        for i in range(count)
    ]


def plain_prompts(pipe: Any) -> list[str]:
    """What a pipeline is measured with that we know nothing of."""
    if takes_classes(pipe):
        return [str(number) for number in _spread(pipe)[::2]]
    return list(PLAIN_PROMPTS)


def training_prompts(subject: Subject) -> list[str]:
    """What parts are trained on; never what a benchmark measures with by itself."""
    if takes_classes(subject.pipe):
        return [str(number) for number in _spread(subject.pipe)[1::2]]
    return own_prompts(subject) or list(TRAINING_PROMPTS)


def training_arguments(picture: Picture) -> dict[str, Any]:
    """Of a call that is measured, what training its parts needs too: all but what it shows."""
    return {k: v for k, v in picture.arguments.items() if k not in ("prompt", "class_labels")}


def _spread(pipe: Any) -> list[int]:
    """Different classes, spread evenly."""
    count = num_classes(pipe)
    return list(dict.fromkeys(i * count // (2 * NUM_CLASSES) for i in range(2 * NUM_CLASSES)))
