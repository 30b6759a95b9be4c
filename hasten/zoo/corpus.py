"""The code corpus: Python's own standard library, which every machine with Python already has.

Files are split into training and held-out by a hash of their relative path, so the same file falls
on the same side on every machine and in every Python version.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hasten.errors import HastenError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HOLD_OUT_SHARE = 0.04  # of the files; about 2 % of the bytes

_SHIPPED_HELD_OUT = Path(__file__).parent / "data" / "held_out" / "files.json.gz"

# Tests are left out because they repeat themselves; the other folders hold generated tables,
# which a model of code would spend its few parameters on.
_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
# `_sysconfigdata*` and `config-*` are written at build time and hold the builder's own paths.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class SourceFile:
    """One source file: its path relative to the library's root (with `/`) and its text."""

    path: str
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """The two sides of the split, each sorted by path."""

    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]


def is_held_out(path: str, share: float = HOLD_OUT_SHARE) -> bool:
    """Whether the file at this relative path is held out; depends on nothing but the path."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def collect(root: Path | None = None) -> Corpus:
    """Read the standard library under `root` (default: that of the running Python).

    Files that are empty, not UTF-8 or a copy of an earlier file are skipped. A file whose copy is
    held out is held out with it, since only the first of two equal files is kept, on either side.

    Raises:
        HastenError: where the folder holds no Python source.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    train: list[SourceFile] = []
    held_out: list[SourceFile] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py"), key=lambda found: found.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _is_skipped(relative):
            continue
        try:
            # newline="" keeps bytes as they are, so that hashes agree between machines.
            with path.open(encoding="utf-8", newline="") as stream:
                text = stream.read()
        except (UnicodeDecodeError, OSError):
            continue
        file = SourceFile(relative.as_posix(), text)
        if not text.strip() or file.sha256 in seen:
            continue
        seen.add(file.sha256)
        (held_out if is_held_out(file.path) else train).append(file)
    if not train:
        raise HastenError(
            f"no Python sources under {root}; give the folder of a Python standard library, "
            "or install one (some systems ship it as a package of its own)"
        )
    return Corpus(tuple(train), tuple(held_out))


def _is_skipped(relative: Path) -> bool:
    return any(
        part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in relative.parts
    )


def shipped_held_out() -> tuple[SourceFile, ...]:
    """The held-out files that ship with hasten, so that quality is measured on one text.

    Empty where the installation has none.
    """
    if not _SHIPPED_HELD_OUT.exists():
        return ()
    texts: dict[str, str] = json.loads(gzip.decompress(_SHIPPED_HELD_OUT.read_bytes()))
    return tuple(SourceFile(path, text) for path, text in sorted(texts.items()))


def save_held_out(files: Sequence[SourceFile], path: Path = _SHIPPED_HELD_OUT) -> None:
    """Write the set that `shipped_held_out` reads; for those who make a release."""
    texts = {file.path: file.text for file in files}
    raw = json.dumps(texts, ensure_ascii=False, sort_keys=True).encode()
    path.write_bytes(gzip.compress(raw, 9, mtime=0))  # no time stamp: same text, same bytes


def default_corpus() -> Corpus:
    """This Python's standard library, with the shipped held-out files in the place of its own.

    Paths are held out in every version; a held-out text that another version keeps under another
    path is dropped from training here.
    """
    corpus = collect()
    held_out = shipped_held_out()
    if not held_out:
        return corpus
    known = {file.sha256 for file in held_out}
    return Corpus(tuple(file for file in corpus.train if file.sha256 not in known), held_out)


class PackedTokens:
    """Tokenised files packed end to end, an end-of-text token after each, cut into windows.

    A batch is a pure function of its index, so a run resumes with no state of its own.
    """

    def __init__(self, files: Sequence[Tensor], seed: int = 0) -> None:
        """`files`: one 1-D integer tensor of ids per file, the end-of-text id included."""
        self._files = list(files)
        self._seed = seed
        self._epochs: dict[int, tuple[tuple[int, int], Tensor, Tensor]] = {}
        self.num_tokens = sum(len(file) for file in self._files)

    def batch(self, index: int, rows: int, length: int) -> Tensor:
        """Batch number `index` of `rows` windows: ids `(rows, length + 1)`, int64.

        Neighbours overlap by one token, so every token is predicted once an epoch. Each epoch has
        its own order of files and of windows.

        Raises:
            HastenError: where the whole stream is shorter than one window.
        """
        windows_per_epoch = (self.num_tokens - 1) // length
        if windows_per_epoch < 1:
            raise HastenError(
                f"the corpus has {self.num_tokens} tokens, fewer than one window of {length} + 1; "
                "use a shorter context or more text"
            )
        windows = []
        for row in range(index * rows, (index + 1) * rows):
            epoch, place = divmod(row, windows_per_epoch)
            stream, order = self._epoch(length, epoch, windows_per_epoch)
            start = int(order[place]) * length
            windows.append(stream[start : start + length + 1])
        return torch.stack(windows).long()

    def _epoch(self, length: int, epoch: int, windows_per_epoch: int) -> tuple[Tensor, Tensor]:
        """The stream of one epoch (1-D) and the order of its windows."""
        cached = self._epochs.get(epoch % 2)
        if cached is None or cached[0] != (length, epoch):
            generator = torch.Generator().manual_seed(
                self._seed * 1_000_003 + length * 1_009 + epoch
            )
            files = torch.randperm(len(self._files), generator=generator).tolist()
            stream = torch.cat([self._files[file] for file in files])
            order = torch.randperm(windows_per_epoch, generator=generator)
            cached = ((length, epoch), stream, order)
            self._epochs[epoch % 2] = cached
        return cached[1], cached[2]


class FileWindows:
    """Windows that lie within one file each, for models that see both ways.

    Files shorter than a window are left out; the last window of a file overlaps the one before it.
    A batch is a pure function of its index, as that of `PackedTokens`.
    """

    def __init__(self, files: Sequence[Tensor], seed: int = 0) -> None:
        """`files`: one 1-D integer tensor of ids per file, the end-of-text id included."""
        self._files = list(files)
        self._seed = seed
        self._windows: dict[int, list[tuple[int, int]]] = {}
        self.num_tokens = sum(len(file) for file in self._files)

    def windows(self, length: int) -> list[tuple[int, int]]:
        """(file, start) of every window of `length` + 1 tokens."""
        if length not in self._windows:
            self._windows[length] = [
                (index, min(start, len(file) - length - 1))
                for index, file in enumerate(self._files)
                if len(file) > length
                for start in range(0, len(file) - 1, length)
            ]
        return self._windows[length]

    def batch(self, index: int, rows: int, length: int) -> Tensor:
        """Batch number `index` of `rows` windows: ids `(rows, length + 1)`, int64.

        Raises:
            HastenError: where no file is as long as a window.
        """
        windows = self.windows(length)
        if not windows:
            raise HastenError(
                f"no file of the corpus has {length} + 1 tokens; use shorter windows or longer files"
            )
        found = []
        for row in range(index * rows, (index + 1) * rows):
            epoch, place = divmod(row, len(windows))
            order = self._order(len(windows), self._seed * 1_000_003 + epoch)
            file, start = windows[int(order[place])]
            found.append(self._files[file][start : start + length + 1])
        return torch.stack(found).long()

    @staticmethod
    @lru_cache(maxsize=4)
    def _order(count: int, seed: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def tokenize(files: Sequence[SourceFile], tokenizer: PreTrainedTokenizerFast) -> list[Tensor]:
    """One int32 tensor of ids per file, with the end-of-text id at its end."""
    # The backend itself, because the wrapper warns about texts longer than one context.
    encoded = tokenizer.backend_tokenizer.encode_batch([file.text for file in files])
    return [torch.tensor([*one.ids, tokenizer.eos_token_id], dtype=torch.int32) for one in encoded]


def training_texts(num_bytes: int, seed: int = 0) -> list[str]:
    """Documents of the training split, about `num_bytes` in all; the same for a given seed.

    What techniques train their parts on where the user gives no text.
    """
    files = list(default_corpus().train)
    random.Random(seed).shuffle(files)
    chosen: list[str] = []
    for file in files:
        if num_bytes <= 0:
            break
        chosen.append(file.text)
        num_bytes -= file.num_bytes
    return chosen
