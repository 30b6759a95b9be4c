"""The user's data folder, and files that are either old or new but never half-written."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from pathlib import Path

from hasten.errors import HastenError


def home() -> Path:
    """Folder for the ledger, measured limits and trained parts. It may not exist yet.

    `HASTEN_HOME` wins where it is set; otherwise the platform's place for user data
    (`$XDG_DATA_HOME/hasten` or `~/.local/share/hasten` on Linux).
    """
    chosen = os.environ.get("HASTEN_HOME", "").strip()
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "hasten"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "hasten"
    xdg = os.environ.get("XDG_DATA_HOME", "")
    # The XDG specification asks for relative values to be ignored.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".local" / "share"
    return base / "hasten"


def ensure_folder(folder: Path) -> Path:
    """Create a folder with its parents. Raises HastenError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> Path:
    """Write a whole file at once, so that a reader or a killed process sees old or new.

    Text is written as UTF-8. Raises HastenError where the place cannot be written.
    """
    target = Path(path).expanduser()
    # A link keeps pointing at its file; replacing the link itself would surprise its owner.
    target = target.resolve() if target.is_symlink() else target.absolute()
    if target.exists() and not target.is_file():
        # os.replace would happily swap a device such as /dev/null for a plain file.
        raise HastenError(f"cannot write {target}: it is not a regular file; give a file name")
    ensure_folder(target.parent)
    data = content.encode("utf-8") if isinstance(content, str) else content
    draft = target.parent / f".hasten-{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else None
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(draft, mode)
        os.replace(draft, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        # After a success there is nothing under this name; after Ctrl-C there may be.
        with contextlib.suppress(OSError):
            draft.unlink()
    return target


def unwritable(path: Path, error: OSError) -> HastenError:
    """The one sentence that is said wherever hasten cannot write."""
    why = error.strerror or type(error).__name__
    hint = "choose a writable place"
    if path == home() or home() in path.parents:
        hint = "set HASTEN_HOME to a folder that you can write"
    return HastenError(f"cannot write {path}: {why}; {hint}")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every platform can, and then nothing is lost but time."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
