"""Writing a trained model to its folder: the card, and the folder whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hasten.errors import HastenError
from hasten.training.loop import Outcome


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a trained model says of itself; stored beside it as `card.json`."""

    name: str
    num_parameters: int
    data: dict[str, Any]
    training: dict[str, Any]
    quality: dict[str, float]
    recipe: dict[str, Any]
    sha256: str  # of model.safetensors, or of all weights of a model in several parts

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def checked_output(output: Path) -> Path:
    """Refuse to replace anything but a model: the folder is removed when the new one is ready."""
    empty = output.is_dir() and not any(output.iterdir())
    if output.exists() and not empty and not (output / "card.json").is_file():
        raise HastenError(
            f"{output} exists and is no zoo model; give a new folder, or one that holds such a model"
        )
    return output.absolute()


def beside_output(output: Path, part: str) -> Path:
    """A file that a run keeps beside its output until it is over."""
    return output.parent / f".{output.name}.{part}.safetensors"


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `output` when the block ends well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        yield folder
        folder.chmod(0o755)  # temporary files are private; models are not
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        _swap(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, output: Path) -> None:
    """Put `folder` in the place of `output`; a folder cannot be renamed on to a full one."""
    if not output.exists():
        folder.rename(output)
        return
    old = folder.with_name(folder.name + ".old")
    output.rename(old)
    folder.rename(output)
    shutil.rmtree(old)


def describe_run(outcome: Outcome) -> dict[str, Any]:
    """How a run went, for its card."""
    return {
        "steps": outcome.steps,
        "tokens_seen": outcome.tokens,
        "seconds": round(outcome.seconds, 1),
        "machine": _machine(),
        "torch": torch.__version__,
        "evaluations": outcome.evaluations,
    }


def weights_hash(folder: Path) -> str:
    """SHA-256 of all safetensors files in a folder and below, in the order of their paths."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _machine() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} processor with {capability}, {torch.get_num_threads()} thread(s)"


@contextmanager
def torch_state(threads: int | None, seed: int) -> Iterator[None]:
    """Seed torch and set its threads, and put both back."""
    before = torch.get_num_threads()
    if threads is not None:
        if threads < 1:
            raise HastenError(f"threads is {threads}; give 1 or more")
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)
