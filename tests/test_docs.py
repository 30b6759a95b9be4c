"""The documentation is true: its blocks run as written, its pages are up to date, its links resolve.

Blocks of one document run in order in one temporary folder with a data folder of their own. An HTML
comment before a block says what it is: `<!-- file: NAME -->` writes it to a file, `<!-- slow -->` marks a
long one. Blocks of `bash` and `python` are run; those of no language hold make targets and are not.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hasten import docs, technique
from hasten.errors import HastenError
from hasten.measure.ledger import Entry, Ledger

ROOT = Path(__file__).parent.parent
GUIDE = "docs/write-a-technique.md"
DOCUMENTS = ("README.md", "docs/architecture.md", GUIDE)
TIMEOUT = 1800  # seconds a block, on a busy machine
BLOCK = re.compile(
    r"(?:^<!-- (?P<tag>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: str
    number: int
    language: str
    tag: str
    text: str

    @property
    def file(self) -> str | None:
        return self.tag.removeprefix("file: ") if self.tag.startswith("file: ") else None

    @property
    def is_run(self) -> bool:
        return self.file is None and self.language in ("bash", "python")


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        Block(document, i, m["language"], m["tag"] or "", m["text"])
        for i, m in enumerate(BLOCK.finditer(text))
    ]


EVERY = [block for document in DOCUMENTS for block in blocks(document)]


def parameters() -> list[Any]:
    marks = {True: [pytest.mark.zoo, pytest.mark.slow], False: [pytest.mark.zoo]}
    return [
        pytest.param(
            block,
            id=f"{Path(block.document).stem}-{block.number}",
            marks=marks[block.tag == "slow"],
        )
        for block in EVERY
        if block.is_run
    ]


class Desk:
    """A folder for each document, where `hasten`, `python` and `pip` are those of this environment.

    What `pip` installs goes into a folder beside it, so that no environment is changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: set[Block] = set()
        self.site = folder / "site"
        programs = folder / "bin"
        programs.mkdir()
        python = shlex.quote(sys.executable)
        pip = f'{python} -m pip --quiet "$@" --no-build-isolation --no-deps --target {shlex.quote(str(self.site))}'
        for name, line in (
            ("hasten", f'{python} -m hasten "$@"'),
            ("python", f'{python} "$@"'),
            ("pip", pip),
        ):
            (programs / name).write_text(f"#!/bin/sh\nexec {line}\n")
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(self.site))),
            "HASTEN_HOME": str(folder / "home"),
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def place(self, document: str) -> Path:
        """The working folder of a document, with the files that its blocks hold."""
        place = self.folder / Path(document).stem
        if not place.exists():
            place.mkdir()
            for block in blocks(document):
                if block.file:
                    (place / block.file).write_text(block.text, encoding="utf-8")
        return place

    def run(self, command: list[str], place: Path) -> str:
        """Standard output of a command that must succeed; it leaves no process behind."""
        with subprocess.Popen(
            command,
            cwd=place,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as running:
            try:
                out, err = running.communicate(timeout=TIMEOUT)
            except BaseException:
                os.killpg(running.pid, signal.SIGKILL)
                raise
        assert running.returncode == 0, f"{out}\n{err}"
        return out

    def run_block(self, block: Block) -> None:
        """Run a block after the quick ones before it, each of which runs once."""
        if block in self.done:
            return
        for earlier in blocks(block.document)[: block.number]:
            if earlier.is_run and earlier.tag != "slow":
                self.run_block(earlier)
        program = ["bash", "-euo", "pipefail"] if block.language == "bash" else [sys.executable]
        self.run([*program, "-c", block.text], self.place(block.document))
        self.done.add(block)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("documents"))


@pytest.mark.parametrize("block", parameters())
def test_block_runs_as_written(desk: Desk, block: Block) -> None:
    if block.document == GUIDE:
        pytest.importorskip("setuptools", reason="the example package is built without a network")
    desk.run_block(block)


@pytest.mark.zoo
@pytest.mark.slow
def test_the_laws_hold_for_the_example(desk: Desk) -> None:
    """What the guide promises: an installed technique is under the shared suite."""
    pytest.importorskip("setuptools", reason="the example package is built without a network")
    for block in blocks(GUIDE):
        if "pip install" in block.text and block.is_run:
            desk.run_block(block)
    suite = [sys.executable, "-m", "pytest", "tests/test_laws.py", "-q", "-k", "keep_every_nth"]
    summary = desk.run([*suite, "-p", "no:cacheprovider"], ROOT).splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) > 10 and "failed" not in summary and "skipped" not in summary


def test_every_block_is_run_or_named() -> None:
    """Nothing escapes: a block of no language holds make targets and set-up that make does."""
    assert EVERY
    for block in EVERY:
        assert block.language in ("bash", "python", "toml", ""), block
        assert block.tag in ("", "slow") or block.file, block
        if block.language == "toml":
            assert block.file, block
        if block.language == "":
            assert all(
                line.startswith(("make ", ".venv/bin/pip ")) for line in block.text.splitlines()
            ), block


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    texts = [(ROOT / name).read_text() for name in (*DOCUMENTS, ".ci/run", "Makefile")]
    named = {
        name
        for text in texts
        for name in re.findall(r"(?:^|[`#] *)make ([a-z]+)", text, re.MULTILINE)
    }
    assert {"demo", "test", "lint", "types"} <= named <= targets
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize("document", [*DOCUMENTS, "docs/cards/README.md"])
def test_links_and_paths_resolve(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / document).parent / target).exists(), target
    for path in re.findall(r"`((?:hasten|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    if document == "docs/architecture.md":
        for path in re.findall(r"`(causal/[\w./]+|benchmark/[\w./]*|[a-z]+\.py)`", text):
            assert (ROOT / "hasten" / path).exists() or path == "loop.py", path


def test_every_verb_is_in_the_readme() -> None:
    from hasten.cli import app

    text = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        assert re.search(rf"\b(hasten )?{name}\b", text), name


def test_cards_are_up_to_date() -> None:
    assert docs.stale(ROOT / "docs" / "cards") == [], "run `make docs`"


def test_cards_are_written_changed_and_removed(tmp_path: Path) -> None:
    assert docs.main(["cards", str(tmp_path)]) == 0
    assert {file.stem for file in tmp_path.iterdir()} == {"README", *technique.BUILT_IN}
    (tmp_path / "medusa.md").write_text("old")
    (tmp_path / "gone.md").write_text("left over")
    assert docs.main(["cards", str(tmp_path), "--check"]) == 1
    assert docs.stale(tmp_path) == ["gone.md", "medusa.md"]
    assert docs.write(tmp_path) == ["gone.md", "medusa.md"]
    assert docs.main(["cards", str(tmp_path), "--check"]) == 0


def test_a_card_page_says_what_the_technique_declares() -> None:
    pages = docs.pages()
    for name in technique.BUILT_IN:
        kind, page = technique.get(name), pages[f"{name}.md"]
        assert (
            page.startswith(f"# {name}\n") and kind.card.title in page and kind.card.notes in page
        )
        for knob in kind.__dataclass_fields__:  # type: ignore[attr-defined]
            if knob not in ("card", "contract", "name", "part_knobs", "part_settings"):
                assert f"| `{knob}` |" in page
        for claim in kind.card.claims:
            assert f"{claim.value:g}" in page


def test_results_come_from_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path / "home"))
    with pytest.raises(HastenError, match="no present measurement"):
        docs.results("a-model")
    row = {"plan": "medusa", "ratio": {"median": 1.5, "low": 1.4, "high": 1.6}, "ceiling": 2.5}
    row |= {"loss_class": "exact", "proof": {"passed": True}, "verdict": "faster"}
    old = Entry(
        "medusa", ("medusa",), "a-model", "0", "hasten bench", 1, 0, row | {"verdict": "no gain"}
    )
    new = Entry("medusa", ("medusa",), "a-model", "0", "hasten bench", 1, 0, row)
    stale = Entry(
        "d2o", ("d2o",), "a-model", "0", "hasten bench", 1, 0, row, versions={"torch": "0"}
    )
    # Of weights that have been trained anew since.
    other = Entry("zeus", ("zeus",), "a-model", "9", "hasten bench", 1, 0, row)
    Ledger().record_all([other, old, new, stale])
    file = tmp_path / "README.md"
    first, last = docs.block("a-model")
    file.write_text(f"before\n\n{first}\nold\n{last}\n\nafter\n")
    assert docs.main(["results", str(file), "--subject", "a-model"]) == 0
    text = file.read_text()
    assert "| `medusa` | 1.50x (1.40–1.60) | 2.50x | exact, proved |" in text
    assert "speed-up" in text and "no gain" not in text and "d2o" not in text and "old" not in text
    assert "zeus" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert docs.main(["results", str(file), "--subject", "a-model"]) == 0
    assert file.read_text() == text


@pytest.mark.parametrize("subject", ["code-lm", "code-dlm", "code-dlm-block", "scenes-dit"])
def test_readme_has_blocks_of_results(subject: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first, last = docs.block(subject)
    assert text.count(first) == text.count(last) == 1
    assert text.index(first) < text.index(last)
