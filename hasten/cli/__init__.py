"""The command line: one file per group of verbs.

Nothing here imports torch before a verb runs, so that `hasten --help` answers at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from hasten import __version__
from hasten.cli import browsing, measuring, running  # noqa: F401  (each registers its verbs)
from hasten.cli.shared import app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hasten {__version__}")
        raise typer.Exit


@app.callback()
def hasten(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Make a model faster, and prove it.

    A technique is one published method; a plan is a list of them, such as
    "medusa, prefix_kv(budget=0.3)"; and every claim is measured beside the plain model.
    """


def main() -> None:
    """The entry point of `hasten` and of `python -m hasten`."""
    app(prog_name="hasten")
