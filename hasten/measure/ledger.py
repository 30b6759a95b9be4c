"""The local database of measurements: one SQLite file in the user's data folder.

Each entry is written in one transaction, so a killed process leaves it whole or absent, and two
writers wait for each other. Entries are data (JSON), never code.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hasten.errors import HastenError
from hasten.home import ensure_folder, home
from hasten.measure.machine import OF_PIPELINES, machine, versions
from hasten.measure.plain import plain

SCHEMA = 1
APPLICATION_ID = 0x68617374  # "hast", so that another program's database is not mistaken for ours
BUSY_SECONDS = 30.0

_CREATE = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    created TEXT NOT NULL,
    plan TEXT NOT NULL,
    subject TEXT NOT NULL,
    subject_hash TEXT NOT NULL,
    command TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    threads INTEGER NOT NULL,
    seed INTEGER NOT NULL,
    versions TEXT NOT NULL,
    row TEXT NOT NULL
);
CREATE TABLE techniques (
    entry INTEGER NOT NULL REFERENCES entries(id),
    place INTEGER NOT NULL,
    technique TEXT NOT NULL,
    PRIMARY KEY (entry, place)
) WITHOUT ROWID;
CREATE INDEX techniques_by_name ON techniques (technique);
CREATE INDEX entries_by_subject ON entries (subject);
"""


@dataclass(frozen=True)
class Entry:
    """One measured row with its conditions.

    `row` is a row of `bench --json`; `plan` its plan as text and `techniques` the names in it, in
    order. `created` is UTC, ISO 8601. `number` is given by the ledger.
    """

    plan: str
    techniques: tuple[str, ...]
    subject: str
    subject_hash: str
    command: str
    threads: int
    seed: int
    row: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=versions)
    fingerprint: str = field(default_factory=lambda: machine().fingerprint)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    number: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON, with `stale`: the reasons why the figures no longer hold."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**plain(fields), "stale": list(stale_reasons(self))}


def stale_reasons(
    entry: Entry,
    *,
    now_versions: Mapping[str, str] | None = None,
    now_fingerprint: str | None = None,
) -> tuple[str, ...]:
    """Why an entry's figures need not hold here and now; empty where nothing has changed.

    Give `now_versions` (with those of `OF_PIPELINES`) and `now_fingerprint` to judge many entries
    at one look at the machine.
    """
    here = versions(*OF_PIPELINES) if now_versions is None else now_versions
    fingerprint = machine().fingerprint if now_fingerprint is None else now_fingerprint
    # What only pipelines depend on says nothing about other subjects.
    others = () if _is_of_a_pipeline(entry) else OF_PIPELINES
    reasons = [
        f"{name} {entry.versions.get(name, 'unknown')} then, {here.get(name, 'unknown')} now"
        for name in sorted({*here, *entry.versions}.difference(others))
        if here.get(name) != entry.versions.get(name)
    ]
    if entry.fingerprint != fingerprint:
        reasons.append("another machine")
    return tuple(reasons)


def _is_of_a_pipeline(entry: Entry) -> bool:
    """Whether pictures were counted; entries that were written earlier do not name Diffusers."""
    return "images_per_second" in entry.row or not set(OF_PIPELINES).isdisjoint(entry.versions)


def is_stale(entry: Entry) -> bool:
    """Measured under other versions or on another machine; such rows are shown grey."""
    return bool(stale_reasons(entry))


class Ledger:
    """The measurements of this user. Opens its file anew for each call, so it survives a fork."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else home() / "ledger.sqlite3"

    def check_writable(self) -> None:
        """Raise HastenError now rather than after a long measurement."""
        with self._connect(create=True) as connection, _transaction(connection):
            pass

    def record(self, entry: Entry) -> Entry:
        """Add one entry, all of it or nothing; returns it with its number."""
        return self.record_all([entry])[0]

    def record_all(self, entries: Sequence[Entry]) -> list[Entry]:
        """Add several entries in one transaction. Raises HastenError where it cannot be written."""
        # Turned into text first: what cannot be stored must fail before the file is locked.
        rows = [(entry, _columns(entry)) for entry in entries]
        numbered = []
        with self._connect(create=True) as connection, _transaction(connection):
            for entry, columns in rows:
                names = ", ".join(columns)
                marks = ", ".join("?" * len(columns))
                cursor = connection.execute(
                    f"INSERT INTO entries ({names}) VALUES ({marks})", tuple(columns.values())
                )
                number = cursor.lastrowid
                connection.executemany(
                    "INSERT INTO techniques (entry, place, technique) VALUES (?, ?, ?)",
                    [(number, place, name) for place, name in enumerate(entry.techniques)],
                )
                numbered.append(replace(entry, number=number))
        return numbered

    def entries(
        self,
        technique: str | None = None,
        subject: str | None = None,
        *,
        alone: bool = False,
    ) -> list[Entry]:
        """Entries in order of writing; of plans that contain a technique, of one subject.

        `alone` keeps only plans of a single technique, whose figures are its own. A ledger that
        does not exist yet is empty.
        """
        try:
            os.stat(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._explain(error) from error
        where, values = ["1"], []
        if technique is not None:
            where.append("id IN (SELECT entry FROM techniques WHERE technique = ?)")
            values.append(technique)
        if subject is not None:
            where.append("subject = ?")
            values.append(subject)
        if alone:
            where.append("(SELECT COUNT(*) FROM techniques WHERE entry = id) = 1")
        with self._connect(create=False) as connection:
            connection.row_factory = sqlite3.Row
            rows = connection.execute(
                f"SELECT * FROM entries WHERE {' AND '.join(where)} ORDER BY id", values
            ).fetchall()
            pairs = connection.execute(
                "SELECT entry, technique FROM techniques ORDER BY entry, place"
            ).fetchall()
        members: dict[int, list[str]] = {}
        for number, name in pairs:
            members.setdefault(number, []).append(name)
        return [_entry(row, members.get(row["id"], [])) for row in rows]

    @contextmanager
    def _connect(self, *, create: bool) -> Iterator[sqlite3.Connection]:
        """An open, checked connection; every failure becomes one HastenError."""
        if create:
            ensure_folder(self.path.parent)
        connection: sqlite3.Connection | None = None
        try:
            # Transactions are opened by hand: the driver's own start too late to exclude a writer.
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            self._prepare(connection)
            yield connection
        except sqlite3.Error as error:
            raise self._explain(error) from error
        finally:
            if connection is not None:
                connection.close()

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # One read transaction, so that a ledger which is just being made is seen whole or not.
        with _transaction(connection, "BEGIN"):
            exists = self._is_ours(connection)
        _use_wal(connection)
        if exists:
            return
        with _transaction(connection):
            # Another process may have made the tables while this one waited for the lock.
            if not self._is_ours(connection):
                for statement in _CREATE.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA}")

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """True for a ledger, False for an empty file; HastenError for anything else."""
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        schema = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        if owner == 0 and schema == 0 and tables == 0:
            return False
        if owner != APPLICATION_ID:
            raise HastenError(
                f"{self.path} is a database of another program; move it away, or set HASTEN_HOME "
                "to another folder"
            )
        if schema > SCHEMA:
            raise HastenError(
                f"{self.path} was written by a newer hasten (schema {schema}, this one reads "
                f"{SCHEMA}); update hasten, or set HASTEN_HOME to another folder"
            )
        return True

    def _explain(self, error: sqlite3.Error | OSError) -> HastenError:
        text = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if "locked" in text or "busy" in text:
            why = f"another process has held it for {BUSY_SECONDS:.0f} s; try again"
        elif "not a database" in text:
            why = "it is not an SQLite database; move it away, or set HASTEN_HOME to another folder"
        elif "malformed" in text:
            why = "it is damaged; move it away, or set HASTEN_HOME to another folder"
        else:
            why = f"{text}; set HASTEN_HOME to a folder that you can write"
        return HastenError(f"cannot use the ledger {self.path}: {why}")


@contextmanager
def _transaction(connection: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """All or nothing; unless `begin` says otherwise the write lock is taken at the start."""
    connection.execute(begin)
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a full disk has rolled back already
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Write-ahead log: readers never wait. Stays off where the file system cannot do it."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
            if mode != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # The switch itself does not honour the busy timeout.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _columns(entry: Entry) -> dict[str, Any]:
    return {
        "created": entry.created,
        "plan": entry.plan,
        "subject": entry.subject,
        "subject_hash": entry.subject_hash,
        "command": entry.command,
        "fingerprint": entry.fingerprint,
        "threads": entry.threads,
        "seed": entry.seed,
        "versions": json.dumps(plain(entry.versions), sort_keys=True),
        "row": json.dumps(plain(entry.row)),
    }


def _entry(row: sqlite3.Row, techniques: list[str]) -> Entry:
    return Entry(
        plan=row["plan"],
        techniques=tuple(techniques),
        subject=row["subject"],
        subject_hash=row["subject_hash"],
        command=row["command"],
        threads=row["threads"],
        seed=row["seed"],
        row=json.loads(row["row"]),
        versions=json.loads(row["versions"]),
        fingerprint=row["fingerprint"],
        created=row["created"],
        number=row["id"],
    )
