"""`--argument NAME=VALUE`: what a pipeline is called with beside its prompt."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from hasten.errors import HastenError

Arguments = Annotated[
    list[str] | None,
    typer.Option(
        "--argument",
        metavar="NAME=VALUE",
        help="An argument of a pipeline's call, such as height=512. Repeatable.",
    ),
]


def read_arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """Arguments by name; a value that is no number, True, False or None is a text."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise HastenError(
                f"--argument {text} is not NAME=VALUE; write it as in --argument height=512."
            )
        if name in found:
            raise HastenError(f"--argument {name} is given twice; give it once.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def only_for_pipelines(name: str, **options: Any) -> None:
    """Raise for an option of pipelines that was given with a model of another kind."""
    for option, value in options.items():
        if value not in (None, [], ()):
            raise HastenError(
                f"--{option.replace('_', '-')} is for Diffusers pipelines, and {name} is none."
            )
