"""What the verbs share: errors in one line, one JSON object, progress, and common options."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from hasten.errors import HastenError

if TYPE_CHECKING:
    from hasten.preparation import Tick

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count it
SECONDS_BETWEEN_DRAWINGS = 0.1


class Verbs(TyperGroup):
    """Turns a mistake in what was given into one line and exit code 2, and Ctrl-C into 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HastenError as error:
            _complain(f"error: {error}")
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt as stop:
            _complain("interrupted; nothing was left half-written")
            raise typer.Exit(INTERRUPTED) from stop
        except Exception as error:
            # torch's own class cannot be named here: torch may not have been imported.
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                _complain(
                    "error: out of memory; use a smaller model, a shorter prompt or fewer new tokens"
                )
                raise typer.Exit(USER_ERROR) from error
            raise


app = typer.Typer(
    cls=Verbs,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def verb(
    *examples: str, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a verb; its examples stand at the end of its `--help`."""
    lines = [f"[cyan]{escape(example)}[/cyan]" for example in examples]
    return app.command(name, epilog="\n\n".join(["[bold]Examples[/bold]", *lines]))


def _complain(words: str) -> None:
    """One line on stderr, whatever the message holds."""
    print(" ".join(words.split()), file=sys.stderr)


def note(words: str) -> None:
    """A remark on stderr that is no part of the answer."""
    print(words, file=sys.stderr)


# -- options that mean the same in every verb ----------------------------------------------------

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A zoo name, a checkpoint folder, or a hub id (owner/name)."
    ),
]
Plans = Annotated[
    list[str],
    typer.Option(
        "--with",
        metavar="PLAN",
        help='Techniques such as "medusa" or "prefix_kv(budget=0.3)", or a plan file (.toml). Repeatable.',
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Every random choice follows from it.")]
Threads = Annotated[
    int | None, typer.Option(metavar="N", help="Processor threads. Default: as torch chooses.")
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="New tokens at most for each prompt.")]
BlockLength = Annotated[
    int | None, typer.Option(metavar="N", help="Tokens of a block, for models that fill masks.")
]

Steps = Annotated[
    int, typer.Option(metavar="N", help="Steps of the sampler, for Diffusers pipelines.")
]
Guidance = Annotated[
    float | None,
    typer.Option(metavar="X", help="Guidance scale of a pipeline. Default: the pipeline's own."),
]


class RunnerName(StrEnum):
    """Runners by name; `auto` takes the fastest that carries the plan."""

    AUTO = "auto"
    EAGER = "eager"
    COMPILED = "compiled"


class DtypeName(StrEnum):
    """Dtypes of weights by name; `auto` leaves the choice to the verb."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Dtype = Annotated[
    DtypeName,
    typer.Option(metavar="NAME", help="Of the weights: auto, float32, bfloat16 or float16."),
]

Runner = Annotated[
    RunnerName,
    typer.Option(metavar="NAME", help="What executes the passes: auto, eager or compiled."),
]


def plan_texts(given: Sequence[str]) -> list[str]:
    """Plans as text; one that names a .toml file is read from it."""
    from hasten.plan import Plan

    return [str(Plan.load(text)) if text.strip().endswith(".toml") else text for text in given]


def at_least(low: int, **values: int | None) -> None:
    """Raise for an option below its least value; options are named as parameters."""
    for name, value in values.items():
        if value is not None and value < low:
            raise HastenError(f"--{name.replace('_', '-')} is {value}; it must be {low} or more.")


def check_seed(seed: int) -> None:
    """Raise for a seed that no random generator takes."""
    if not 0 <= seed < 2**63:
        raise HastenError(f"--seed is {seed}; allowed is 0 to {2**63 - 1}.")


def use_threads(threads: int | None) -> None:
    """Set torch's threads, where a number was given."""
    at_least(1, threads=threads)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def quiet_libraries(as_json: bool, model: str | None = None) -> None:
    """Keep transformers from warning about what hasten checks itself, and from drawing bars.

    Bars of loading and downloading stay for someone who waits for a model from elsewhere.
    """
    from transformers.utils import logging

    import hasten.zoo.catalogue as zoo

    logging.set_verbosity_error()
    watched = sys.stderr.isatty() and not as_json
    if model is None or not watched or zoo.is_zoo_name(model):
        logging.disable_progress_bar()


# -- output --------------------------------------------------------------------------------------


def console() -> Console:
    """Where tables go; made anew so that it follows a replaced stdout."""
    return Console()


@contextlib.contextmanager
def only_json(wanted: bool) -> Iterator[None]:
    """While a JSON object is being made, whatever else is printed goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext():
        yield


def print_json(value: Any) -> None:
    """The one JSON object of a verb."""
    from hasten.measure.plain import plain

    print(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def progress(quiet: bool = False) -> Iterator[Tick]:
    """A bar with the time left, on stderr; nothing where JSON is wanted or nobody watches."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    screen = Console(stderr=True)
    if quiet or not screen.is_terminal:
        yield lambda done, total, message: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    # Drawn by `tick` alone: a thread that draws would disturb what is being timed.
    with Progress(*columns, console=screen, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)
        reached, drawn = 0, 0.0

        def tick(done: int, total: int, message: str) -> None:
            nonlocal reached, drawn
            if done < reached:  # the next part of the work: its speed is its own
                bar.reset(task)
            reached = done
            bar.update(task, completed=done, total=total, description=escape(message))
            now = time.monotonic()
            if done == total or now - drawn > SECONDS_BETWEEN_DRAWINGS:
                bar.refresh()
                drawn = now

        yield tick


def need_extra(module: str, extra: str) -> None:
    """Raise now, not after minutes of work, where an optional package is missing."""
    if importlib.util.find_spec(module) is None:
        raise HastenError(f"this needs {module}; install it with: pip install 'hasten[{extra}]'")


def check_output(path: Path) -> None:
    """Raise now, not after minutes of work, where a file could not be written."""
    from hasten.home import unwritable

    target = path.expanduser().absolute()
    if target.exists() and not target.is_file():
        raise HastenError(f"cannot write {path}: it is not a regular file; give a file name")
    folder = next(parent for parent in target.parents if parent.exists())
    try:  # permission bits do not tell (root, read-only file systems), so try
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise unwritable(target, error) from error


def read_text(path: Path) -> str:
    """A text file, with one clear error."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HastenError(f"{path} is not UTF-8 text; give a text file.") from error
    except OSError as error:
        raise HastenError(f"Cannot read {path}: {error.strerror or error}.") from error
