"""The ledger: what is written stays, whatever happens to its writers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from hasten.errors import HastenError
from hasten.measure.ledger import Entry, Ledger, is_stale, stale_reasons
from hasten.measure.machine import OF_PIPELINES, versions


def entry(number: int = 0, **fields: object) -> Entry:
    values: dict[str, object] = {
        "plan": "medusa",
        "techniques": ("medusa",),
        "subject": "code-lm",
        "subject_hash": "feed",
        "command": "hasten bench code-lm --with medusa",
        "threads": 2,
        "seed": 0,
        "row": {"number": number, "ratio": {"median": 1.5, "low": float("nan")}},
    }
    return Entry(**{**values, **fields})  # type: ignore[arg-type]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "folder" / "ledger.sqlite3")


def write_on(path: Path, name: str, count: int, start: Path, report: Connection) -> None:
    """Runs in another process: writes entries in twos once `start` exists, and says so."""
    ledger = Ledger(path)
    report.send("ready")
    while not start.exists():
        time.sleep(0.005)
    for number in range(count):
        ledger.record_all([entry(number, subject=name, row={"n": number, "x": "x" * 5000})] * 2)
        report.send(number)


def writer(path: Path, name: str, count: int, start: Path) -> tuple[BaseProcess, Connection]:
    """A process that has come as far as to wait for `start`. Forked, since imports take long."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=write_on, args=(path, name, count, start, there))
    process.start()
    there.close()
    assert here.recv() == "ready"
    return process, here


def test_round_trip(ledger: Ledger) -> None:
    assert ledger.entries() == []
    assert not ledger.path.exists()  # looking makes nothing
    written = ledger.record(entry(7, plan="b + a(x=1)", techniques=("b", "a")))
    assert written.number == 1
    (found,) = ledger.entries()
    assert found == replace(written, row={"number": 7, "ratio": {"median": 1.5, "low": None}})
    assert found.techniques == ("b", "a")
    assert found.to_dict()["stale"] == []


def test_filters(ledger: Ledger) -> None:
    ledger.record_all(
        [
            entry(0),
            entry(1, plan="medusa + d2o", techniques=("medusa", "d2o")),
            entry(2, plan="d2o", techniques=("d2o",), subject="other"),
        ]
    )

    def numbers(found: list[Entry]) -> list[int]:
        return [item.row["number"] for item in found]

    assert numbers(ledger.entries()) == [0, 1, 2]
    assert numbers(ledger.entries("medusa")) == [0, 1]
    assert numbers(ledger.entries("medusa", alone=True)) == [0]
    assert numbers(ledger.entries("d2o", "code-lm")) == [1]
    assert numbers(ledger.entries(subject="other")) == [2]
    assert ledger.entries("'; DROP TABLE entries; --") == []


def test_home_is_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HASTEN_HOME", str(tmp_path))
    Ledger().record(entry())
    assert (tmp_path / "ledger.sqlite3").is_file()


def test_stale_when_versions_or_machine_change() -> None:
    fresh = entry()
    assert not is_stale(fresh) and stale_reasons(fresh) == ()
    older = replace(fresh, versions={**fresh.versions, "torch": "1.0"})
    assert is_stale(older)
    assert stale_reasons(older)[0].startswith("torch 1.0 then, ")
    assert stale_reasons(replace(fresh, fingerprint="elsewhere")) == ("another machine",)
    assert is_stale(replace(fresh, versions={}))
    assert stale_reasons(older, now_versions=older.versions) == ()


def test_entries_of_pipelines_depend_on_diffusers_and_others_do_not(ledger: Ledger) -> None:
    row = {"images_per_second": {"median": 1.0}}
    here = versions(*OF_PIPELINES)
    fresh = entry(row=row, versions=here)
    assert "diffusers" in here and not is_stale(ledger.record(fresh))
    (found,) = ledger.entries()
    assert not is_stale(found) and found.versions["diffusers"] == here["diffusers"]
    older = replace(fresh, versions={**here, "diffusers": "0.1"})
    assert stale_reasons(older) == (f"diffusers 0.1 then, {here['diffusers']} now",)
    # Written before its version was: what it was, nobody knows.
    unknown = replace(fresh, versions=versions())
    assert stale_reasons(unknown, now_versions=here) == (
        f"diffusers unknown then, {here['diffusers']} now",
    )
    text = entry(row={"tokens_per_second": {"median": 1.0}})
    assert not is_stale(text) and stale_reasons(text, now_versions=here) == ()


def test_all_or_nothing(ledger: Ledger) -> None:
    ledger.record(entry(0))
    with pytest.raises(TypeError, match="cannot be written"):
        ledger.record_all([entry(1), entry(2, row={"bad": object()})])
    bad = entry(3, subject=None)  # breaks a rule of the database after the first insert
    with pytest.raises(HastenError, match="NOT NULL"):
        ledger.record_all([entry(4), bad])
    assert [item.row["number"] for item in ledger.entries()] == [0]


def test_a_killed_writer_leaves_whole_entries(ledger: Ledger, tmp_path: Path) -> None:
    start = tmp_path / "start"
    process, report = writer(ledger.path, "killed", 100_000, start)
    start.touch()
    confirmed = [report.recv() for _ in range(5)][-1]
    time.sleep(0.013)  # somewhere in the middle of a later one
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with contextlib.suppress(EOFError):
        while True:
            confirmed = report.recv()
    numbers = [item.row["n"] for item in ledger.entries()]
    assert len(numbers) % 2 == 0  # each transaction is there with both its rows
    assert numbers[::2] == numbers[1::2] == list(range(len(numbers) // 2))
    assert len(numbers) // 2 >= confirmed + 1  # what was confirmed is there
    ledger.record(entry(99))
    assert ledger.entries()[-1].row["number"] == 99
    with sqlite3.connect(ledger.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_transaction_killed_before_its_end_is_gone(ledger: Ledger) -> None:
    ledger.record(entry(0))
    code = f"""
import os, signal, sqlite3
connection = sqlite3.connect({str(ledger.path)!r}, isolation_level=None)
connection.execute("PRAGMA cache_spill = 1")
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE entries SET plan = 'half'")
connection.execute("CREATE TABLE filler (x)")
connection.executemany("INSERT INTO filler VALUES (?)", [("x" * 900,)] * 2000)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert [item.plan for item in ledger.entries()] == ["medusa"]
    ledger.record(entry(1))
    assert len(ledger.entries()) == 2


def test_two_writers_lose_nothing(ledger: Ledger, tmp_path: Path) -> None:
    """Both also race to make the file: it does not exist when they start."""
    start = tmp_path / "start"
    processes = [writer(ledger.path, name, 12, start)[0] for name in ("one", "two")]
    assert not ledger.path.exists()
    start.touch()
    for process in processes:
        process.join(timeout=50)
        assert process.exitcode == 0
    for name in ("one", "two"):
        numbers = [item.row["n"] for item in ledger.entries(subject=name)]
        assert numbers == [number for number in range(12) for _ in range(2)]


def test_readers_do_not_wait_for_a_writer(ledger: Ledger) -> None:
    ledger.record(entry(0))
    with sqlite3.connect(ledger.path, isolation_level=None) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE entries SET plan = 'changing'")
        assert ledger.entries()[0].plan == "medusa"
        connection.execute("ROLLBACK")


def broken_places(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "text.sqlite3").write_text("this is no database " * 100)
    (tmp_path / "folder.sqlite3").mkdir()
    (tmp_path / "file").write_text("")
    with sqlite3.connect(tmp_path / "foreign.sqlite3") as connection:
        connection.execute("CREATE TABLE theirs (x)")
    with sqlite3.connect(tmp_path / "newer.sqlite3") as connection:
        connection.execute("CREATE TABLE entries (x)")
        connection.execute(f"PRAGMA application_id = {0x68617374}")
        connection.execute("PRAGMA user_version = 999")
    return {
        "text": (tmp_path / "text.sqlite3", "not an SQLite database"),
        "folder": (tmp_path / "folder.sqlite3", "unable to open"),
        "under a file": (tmp_path / "file" / "ledger.sqlite3", "cannot (write|use)"),
        "foreign": (tmp_path / "foreign.sqlite3", "another program"),
        "newer": (tmp_path / "newer.sqlite3", "newer hasten"),
    }


@pytest.mark.parametrize("case", ["text", "folder", "under a file", "foreign", "newer"])
def test_what_is_no_ledger_gives_one_clear_error(tmp_path: Path, case: str) -> None:
    path, words = broken_places(tmp_path)[case]
    before = path.read_bytes() if path.is_file() else None
    for action in (
        lambda: Ledger(path).record(entry()),
        lambda: Ledger(path).entries(),
        lambda: Ledger(path).check_writable(),
    ):
        with pytest.raises(HastenError, match=words) as caught:
            action()
        assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_damaged_ledger(ledger: Ledger) -> None:
    ledger.record_all([entry(number, row={"filler": "x" * 3000}) for number in range(40)])
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HastenError, match="cannot use the ledger"):
        ledger.entries()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(HastenError, match="HASTEN_HOME"):
            Ledger(tmp_path / "ledger.sqlite3").record(entry())
    finally:
        tmp_path.chmod(0o700)


def test_check_writable_leaves_an_empty_ledger(ledger: Ledger) -> None:
    ledger.check_writable()
    assert ledger.path.exists() and ledger.entries() == []
