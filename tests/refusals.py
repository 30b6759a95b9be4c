"""Whoever runs the command line on bad input: it refuses in one line, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from hasten.cli import app

ROOT = Path(__file__).parent.parent


def refused(home: Path, *arguments: str) -> str:
    """Run the command line; it must refuse in one line and leave nothing. Returns that line."""
    before = set(home.rglob("*"))
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    # The ledger may have been opened to see whether it can be written.
    left = {path for path in home.rglob("*") if not path.name.startswith("ledger.sqlite3")}
    assert left - before <= {home / "home"}
    return line


def refused_by_the_program(folder: Path, *arguments: str, home: str = "home") -> str:
    """As `refused`, in a process of its own: whatever libraries would like to say, there is one line.

    Args:
        folder: holds the data folder `home` and the working folder.
    """
    (folder / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "hasten", *arguments],
        cwd=folder / "work",
        env={**os.environ, "HASTEN_HOME": str(folder / home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert not list((folder / "work").iterdir())
    return str(line)
