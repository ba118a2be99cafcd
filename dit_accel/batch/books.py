"""The SQLite file of a batch: it survives kill -9 and power loss, and tells the whole story.

A rollback journal with full synchronisation: a transaction is on disk when it returns, and the
file may lie on a network drive, where a write-ahead log may not. Every change of a job's state is
also an event.
"""

from __future__ import annotations

import errno
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_accel.media import owner as owners

NAME = "manifest.sqlite"
VERSION = 2
STATES = ("waiting", "running", "done", "failed")
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, number INTEGER NOT NULL, line INTEGER NOT NULL, job TEXT NOT NULL,
  output TEXT NOT NULL UNIQUE, shape TEXT NOT NULL, checked INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed')),
  tries INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0, owner TEXT, lease REAL,
  started REAL, finished REAL, seconds REAL, file TEXT, report TEXT, error TEXT,
  asked INTEGER NOT NULL DEFAULT 1);
CREATE INDEX IF NOT EXISTS queue ON jobs (state, tries, number);
CREATE TABLE IF NOT EXISTS refused (line INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS workers (
  owner TEXT PRIMARY KEY, device TEXT, phase TEXT, done INTEGER, total INTEGER, beat REAL);
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, job TEXT,
  owner TEXT, text TEXT);
CREATE TABLE IF NOT EXISTS runs (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, asked TEXT NOT NULL, beat REAL NOT NULL);
"""
FIRST = ("jobs", "meta", "refused", "workers", "events")  # tables of version 1


class DiskFull(OSError):
    """There is no space left for a clip or for the manifest."""


class Books:
    """The tables of one output folder. Safe to use from several threads and processes.

    Raises ValueError for a file that is no manifest or cannot be written, DiskFull when a change
    cannot be written for want of space.
    """

    def __init__(self, folder: str | Path, lease: float = 60.0) -> None:
        self.folder, self.path, self.lease = Path(folder), Path(folder) / NAME, lease
        self._lock = threading.RLock()
        try:
            with _naming(self.path):
                self._db = sqlite3.connect(
                    self.path, timeout=60, isolation_level=None, check_same_thread=False
                )
                self._db.row_factory = sqlite3.Row
                self._prepare()
        except sqlite3.Error as error:
            if hasattr(self, "_db"):
                self._db.close()
            raise ValueError(
                f"{self.path} is no manifest that can be read ({error}): move it away to start anew"
            ) from None

    def _prepare(self) -> None:
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("BEGIN")  # version and tables at one moment
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        names = self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        self._db.execute("COMMIT")
        tables = {name for (name,) in names}
        if version not in (0, 1, VERSION):
            raise sqlite3.DatabaseError(f"version {version}, this release writes {VERSION}")
        if tables and not (version and tables.issuperset(FIRST)):
            raise sqlite3.DatabaseError("it holds the tables of another program")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE;{SCHEMA}PRAGMA user_version={VERSION};COMMIT;")
        elif version == 1:
            self._migrate()

    def _migrate(self) -> None:
        """From version 1, unless another process has just done so."""
        with self._change() as db:
            if db.execute("PRAGMA user_version").fetchone()[0] == 1:
                db.execute("ALTER TABLE jobs ADD COLUMN asked INTEGER NOT NULL DEFAULT 1")
                db.execute(SCHEMA[SCHEMA.index("CREATE TABLE IF NOT EXISTS runs") :].strip())
                db.execute(f"PRAGMA user_version = {VERSION}")

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """A transaction: all of the block or nothing of it."""
        with self._lock, _naming(self.path):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def ask(self, sql: str, *values: object) -> list[sqlite3.Row]:
        """The rows that a SELECT gives."""
        with self._lock, _naming(self.path):
            return self._db.execute(sql, values).fetchall()

    def note(self, kind: str, text: str, owner: str | None = None, job: str | None = None) -> None:
        """Add an event."""
        with self._change() as db:
            self._note(db, kind, job, owner, text)

    @staticmethod
    def _note(
        db: sqlite3.Connection, kind: str, job: str | None, owner: str | None, text: str | None
    ) -> None:
        db.execute(
            "INSERT INTO events (time, kind, job, owner, text) VALUES (?, ?, ?, ?, ?)",
            (time.time(), kind, job, owner, text),
        )

    def set(self, key: str, value: object) -> None:
        """Remember a JSON-able value under a name."""
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def get(self, key: str, default: Any = None) -> Any:
        """What `set` remembered."""
        found = self.ask("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(found[0]["value"]) if found else default

    def enter(self, run: str, owner: str, asked: str) -> None:
        """A run works here from now on.

        ValueError while another lives that asks for something else; the same may join in.
        """
        with self._change() as db:
            for row in db.execute("SELECT * FROM runs").fetchall():
                if not self._lives(row):
                    db.execute("DELETE FROM runs WHERE id = ?", (row["id"],))
                elif row["asked"] != asked:
                    pid, host = owners.pid_of(row["owner"]), owners.host_of(row["owner"])
                    raise ValueError(
                        f"{self.folder} is in use by another batch, process {pid} on {host}: wait "
                        "until it has ended, or choose another folder"
                    )
            db.execute("INSERT INTO runs VALUES (?, ?, ?, ?)", (run, owner, asked, time.time()))

    def _lives(self, row: sqlite3.Row) -> bool:
        """Whether a run goes on: on another host, while it has been heard of."""
        if owners.is_here(row["owner"]):
            return owners.is_alive(row["owner"])
        return row["beat"] + self.lease > time.time()

    def stay(self, run: str) -> None:
        """The run goes on."""
        with self._change() as db:
            db.execute("UPDATE runs SET beat = ? WHERE id = ?", (time.time(), run))

    def exit(self, run: str) -> None:
        """The run has ended."""
        with self._change() as db:
            db.execute("DELETE FROM runs WHERE id = ?", (run,))

    def counts(self) -> dict[str, int]:
        """State → number of the jobs that the last plan asks for, all four states."""
        sql = "SELECT state, COUNT(*) AS n FROM jobs WHERE asked = 1 GROUP BY state"
        found = {row["state"]: row["n"] for row in self.ask(sql)}
        return {state: found.get(state, 0) for state in STATES}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """SQLite's two ways of saying that there is no space, as one error; rights as another."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "disk is full" in str(error) or "disk I/O error" in str(error):
            raise DiskFull(errno.ENOSPC, f"no space left for {path}") from error
        if "readonly" in str(error) or "unable to open" in str(error):
            raise ValueError(f"{path} cannot be written ({error}): choose another folder") from None
        raise
