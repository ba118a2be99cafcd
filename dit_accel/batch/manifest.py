"""The queue and the books of a batch: one SQLite file that survives kill -9 and power loss.

A rollback journal with full synchronisation: a transaction is on disk when it returns, and the
file may lie on a network drive, where a write-ahead log may not. Every change of a job's state is
also an event, so that the file tells the whole story.
"""

from __future__ import annotations

import errno
import json
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.batch import owner as owners
from dit_accel.batch.jobs import Job

NAME = "manifest.sqlite"
VERSION = 1
DEATHS = 3  # workers that may die on a job before the job is held to be the cause
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
  id TEXT PRIMARY KEY, number INTEGER NOT NULL, line INTEGER NOT NULL, job TEXT NOT NULL,
  output TEXT NOT NULL UNIQUE, shape TEXT NOT NULL, checked INTEGER NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('waiting', 'running', 'done', 'failed')),
  tries INTEGER NOT NULL DEFAULT 0, deaths INTEGER NOT NULL DEFAULT 0, owner TEXT, lease REAL,
  started REAL, finished REAL, seconds REAL, file TEXT, report TEXT, error TEXT);
CREATE INDEX IF NOT EXISTS queue ON jobs (state, tries, number);
CREATE TABLE IF NOT EXISTS refused (line INTEGER NOT NULL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS workers (
  owner TEXT PRIMARY KEY, device TEXT, phase TEXT, done INTEGER, total INTEGER, beat REAL);
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, kind TEXT NOT NULL, job TEXT,
  owner TEXT, text TEXT);
"""


class DiskFull(OSError):
    """There is no space left for a clip or for the manifest."""


@dataclass(frozen=True)
class Claim:
    """A claimed job.

    id: of the job.
    values: of its line in the job file.
    output: name of its file.
    checked: it also runs dense, to be compared.
    turn: counts claims of it: an older claim can change nothing any more.
    """

    id: str
    values: dict[str, Any]
    output: str
    checked: bool
    turn: int


class Manifest:
    """The manifest of one output folder. Safe to use from several threads and processes.

    Raises ValueError for a file that is no manifest, DiskFull when a change cannot be written.
    """

    def __init__(self, folder: str | Path, lease: float = 60.0) -> None:
        self.folder, self.path, self.lease = Path(folder), Path(folder) / NAME, lease
        self._lock = threading.RLock()
        self._db = sqlite3.connect(
            self.path, timeout=60, isolation_level=None, check_same_thread=False
        )
        self._db.row_factory = sqlite3.Row
        try:
            with _naming(self.path):
                self._prepare()
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ValueError(
                f"{self.path} is no manifest that can be read ({error}): move it away to start anew"
            ) from None

    def _prepare(self) -> None:
        self._db.execute("PRAGMA synchronous = FULL")
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"version {version}, this release writes {VERSION}")
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE;{SCHEMA}PRAGMA user_version={VERSION};COMMIT;")

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

    def ask(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """The rows that a SELECT gives."""
        with self._lock, _naming(self.path):
            return self._db.execute(sql, values).fetchall()

    def plan(
        self,
        jobs: Sequence[tuple[int, Job]],
        problems: Sequence[tuple[int, str]] = (),
        *,
        check_every: int = 0,
        retry_failed: bool = False,
    ) -> None:
        """Make these jobs the queue: what is done stays done, what is no longer asked for goes.

        A job that was done and whose file is gone waits again, and so do failed ones when asked.
        """
        with self._change() as db:
            db.execute("DELETE FROM refused")
            db.executemany("INSERT INTO refused VALUES (?, ?)", problems)
            db.execute("DELETE FROM meta WHERE key = 'stop'")
            wanted = {job.id for _, job in jobs}
            known = {row["id"]: row for row in db.execute("SELECT * FROM jobs")}
            for id, row in known.items():
                if id not in wanted and row["state"] in ("waiting", "failed"):
                    db.execute("DELETE FROM jobs WHERE id = ?", (id,))
                elif row["state"] == "done" and not (self.folder / row["file"]).is_file():
                    self._again(db, id, f"{row['file']} is gone: it is made again")
                elif row["state"] == "failed" and retry_failed:
                    self._again(db, id, "retried as asked")
            for number, (line, job) in enumerate(jobs, 1):
                checked = bool(check_every) and number % check_every == 0 and job.config is not None
                self._put(db, number, line, job, checked)

    def _put(self, db: sqlite3.Connection, number: int, line: int, job: Job, checked: bool) -> None:
        shape = f"{job.id} alone" if checked else job.shape
        text = json.dumps(job.to_dict(), ensure_ascii=False)
        try:
            db.execute(
                "INSERT INTO jobs (id, number, line, job, output, shape, checked, state)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, 'waiting') ON CONFLICT (id) DO UPDATE"
                " SET number = excluded.number, line = excluded.line, job = excluded.job,"
                " output = CASE state WHEN 'done' THEN output ELSE excluded.output END,"
                " shape = excluded.shape, checked = excluded.checked",
                (job.id, number, line, text, job.output, shape, checked),
            )
        except sqlite3.IntegrityError:
            raise ValueError(
                f"line {line}: {job.output} is the name of another clip in {self.folder}"
            ) from None

    def _again(self, db: sqlite3.Connection, id: str, text: str) -> None:
        db.execute(
            "UPDATE jobs SET state = 'waiting', tries = 0, deaths = 0, file = NULL, error = NULL"
            " WHERE id = ?",
            (id,),
        )
        self._note(db, "again", id, None, text)

    def claim(self, owner: str, limit: int = 1) -> list[Claim]:
        """Take the next job, and up to `limit` of equal shape, for `owner`; [] when none waits.

        Jobs of owners that are no longer alive are put back first.
        """
        self.reclaim()
        if not self.ask("SELECT 1 FROM jobs WHERE state = 'waiting' LIMIT 1"):
            return []
        now = time.time()
        with self._change() as db:
            if db.execute("SELECT 1 FROM meta WHERE key = 'stop'").fetchone():
                return []
            first = db.execute(
                "SELECT shape, tries, deaths FROM jobs WHERE state = 'waiting'"
                " ORDER BY tries + deaths, number LIMIT 1"
            ).fetchone()
            if first is None:
                return []
            limit = 1 if first["tries"] or first["deaths"] else limit  # what failed goes alone
            rows = db.execute(
                "SELECT * FROM jobs WHERE state = 'waiting' AND shape = ?"
                " ORDER BY tries + deaths, number LIMIT ?",
                (first["shape"], limit),
            ).fetchall()
            for row in rows:
                db.execute(
                    "UPDATE jobs SET state = 'running', tries = tries + 1, owner = ?, lease = ?,"
                    " started = ?, error = NULL WHERE id = ?",
                    (owner, now + self.lease, now, row["id"]),
                )
                self._note(db, "started", row["id"], owner, None)
        return [self._row(row) for row in rows]

    @staticmethod
    def _row(row: sqlite3.Row) -> Claim:
        turn = row["tries"] + row["deaths"] + 1
        return Claim(row["id"], json.loads(row["job"]), row["output"], bool(row["checked"]), turn)

    def finish(self, row: Claim, owner: str, file: str, seconds: float, report: dict) -> bool:
        """The clip is on disk. False when the job has gone to another worker meanwhile."""
        with self._change() as db:
            changed = db.execute(
                "UPDATE jobs SET state = 'done', file = ?, seconds = ?, report = ?, finished = ?,"
                f" owner = NULL, lease = NULL {_MINE}",
                (file, seconds, json.dumps(report), time.time(), row.id, owner, row.turn),
            ).rowcount
            if changed:
                self._note(db, "done", row.id, owner, f"{seconds:.2f} s")
        return bool(changed)

    def fail(self, row: Claim, owner: str, reason: str, retries: int = 0) -> None:
        """The job gave no clip: it waits again while `retries` are left, otherwise it is failed."""
        with self._change() as db:
            tries = db.execute(f"SELECT tries FROM jobs {_MINE}", (row.id, owner, row.turn))
            found = tries.fetchone()
            if found is None:
                return
            final = found["tries"] > retries
            db.execute(
                "UPDATE jobs SET state = ?, error = ?, finished = ?, owner = NULL, lease = NULL"
                " WHERE id = ?",
                ("failed" if final else "waiting", reason, time.time(), row.id),
            )
            self._note(db, "failed" if final else "retry", row.id, owner, reason)

    def refuse(self, id: str, reason: str) -> None:
        """Fail a job that has not been started: the model cannot take it."""
        with self._change() as db:
            changed = db.execute(
                "UPDATE jobs SET state = 'failed', error = ?, finished = ?"
                " WHERE id = ? AND state = 'waiting'",
                (reason, time.time(), id),
            ).rowcount
            if changed:
                self._note(db, "failed", id, None, reason)

    def release(self, owner: str, reason: str) -> None:
        """Put an owner's jobs back as if it had never taken them: it was stopped on purpose."""
        with self._change() as db:
            for row in db.execute("SELECT id FROM jobs WHERE owner = ?", (owner,)).fetchall():
                db.execute(
                    "UPDATE jobs SET state = 'waiting', tries = tries - 1, owner = NULL,"
                    " lease = NULL WHERE id = ?",
                    (row["id"],),
                )
                self._note(db, "released", row["id"], owner, reason)

    def reclaim(self) -> None:
        """Put back the jobs of owners that died, or, on another host, no longer answer."""
        held = self.ask(
            "SELECT owner, MIN(lease) AS lease FROM jobs WHERE state = 'running' GROUP BY owner"
        )
        for row in held:
            if owners.is_here(row["owner"]):
                if not owners.is_alive(row["owner"]):
                    self.bury(row["owner"], "its worker died")
            elif row["lease"] < time.time():
                self.bury(row["owner"], "its worker no longer answers")

    def bury(self, owner: str, reason: str) -> None:
        """An owner is dead: its jobs go to the others; one that saw too many deaths is failed."""
        with self._change() as db:
            db.execute("DELETE FROM workers WHERE owner = ?", (owner,))
            held = db.execute("SELECT id, deaths FROM jobs WHERE owner = ?", (owner,)).fetchall()
            for row in held:
                final = row["deaths"] + 1 >= DEATHS
                text = f"{reason} ({row['deaths'] + 1} times on this job)" if final else reason
                db.execute(
                    "UPDATE jobs SET state = ?, error = ?, tries = tries - 1, deaths = deaths + 1,"
                    " finished = ?, owner = NULL, lease = NULL WHERE id = ?",
                    ("failed" if final else "waiting", text, time.time(), row["id"]),
                )
                self._note(db, "failed" if final else "lost", row["id"], owner, text)

    def beat(self, owner: str, device: str, phase: str, done: int, total: int | None) -> None:
        """The owner lives: its leases run on, and this is what it is doing."""
        now = time.time()
        with self._change() as db:
            db.execute(
                "INSERT INTO workers VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (owner) DO UPDATE SET"
                " phase = excluded.phase, done = excluded.done, total = excluded.total,"
                " beat = excluded.beat",
                (owner, device, phase, done, total, now),
            )
            db.execute("UPDATE jobs SET lease = ? WHERE owner = ?", (now + self.lease, owner))

    def leave(self, owner: str) -> None:
        """The owner ends well: it holds nothing any more."""
        with self._change() as db:
            db.execute("DELETE FROM workers WHERE owner = ?", (owner,))

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

    def set(self, key: str, value: Any) -> None:
        """Remember a JSON-able value under a name."""
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def get(self, key: str, default: Any = None) -> Any:
        """What `set` remembered."""
        found = self.ask("SELECT value FROM meta WHERE key = ?", key)
        return json.loads(found[0]["value"]) if found else default

    def counts(self) -> dict[str, int]:
        """State → number of jobs, all four states."""
        found = {
            r["state"]: r["n"]
            for r in self.ask("SELECT state, COUNT(*) AS n FROM jobs GROUP BY state")
        }
        return {state: found.get(state, 0) for state in ("waiting", "running", "done", "failed")}


_MINE = "WHERE id = ? AND owner = ? AND state = 'running' AND tries + deaths = ?"


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """SQLite's two ways of saying that there is no space, as one error."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if "disk is full" in str(error) or "disk I/O error" in str(error):
            raise DiskFull(errno.ENOSPC, f"no space left for {path}") from error
        raise
