"""The queue of a batch: what is to be made, who is at it, what came of it."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.batch.books import Books, DiskFull
from dit_accel.batch.jobs import Job
from dit_accel.media import owner as owners

__all__ = ["DEATHS", "Claim", "DiskFull", "Manifest"]
DEATHS = 3  # workers that may die on a job before the job is held to be the cause


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


class Manifest(Books):
    """The queue of one output folder: one owner a job, fenced claims, dead owners found out."""

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
            db.execute("DELETE FROM meta WHERE key IN ('stop', 'hopeless')")
            db.execute("UPDATE jobs SET asked = 0")
            wanted = {job.id for _, job in jobs}
            db.execute("UPDATE jobs SET output = id WHERE state <> 'done'")  # names may be swapped
            known = {row["id"]: row for row in db.execute("SELECT * FROM jobs")}
            for id, row in known.items():
                gone = row["state"] == "done" and not (self.folder / row["file"]).is_file()
                if id not in wanted and (gone or row["state"] in ("waiting", "failed")):
                    db.execute("DELETE FROM jobs WHERE id = ?", (id,))
                elif gone:
                    self._again(db, id, f"{row['file']} is gone: it is made again")
                elif row["state"] == "failed" and retry_failed:
                    self._again(db, id, "retried as asked")
            accelerated = 0
            for number, (line, job) in enumerate(jobs, 1):
                accelerated += job.accelerated
                due = bool(check_every) and accelerated % check_every == 0
                checked = due and job.accelerated
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
                " shape = excluded.shape, checked = excluded.checked, asked = 1",
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
        if not self.ask(f"SELECT 1 FROM jobs {_OPEN} LIMIT 1"):
            return []
        now = time.time()
        with self._change() as db:
            if db.execute("SELECT 1 FROM meta WHERE key = 'stop'").fetchone():
                return []
            first = db.execute(
                f"SELECT shape, tries, deaths FROM jobs {_OPEN}"
                " ORDER BY tries + deaths, number LIMIT 1"
            ).fetchone()
            if first is None:
                return []
            limit = 1 if first["tries"] or first["deaths"] else limit  # what failed goes alone
            rows = db.execute(
                f"SELECT * FROM jobs {_OPEN} AND shape = ? ORDER BY tries + deaths, number LIMIT ?",
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

    def give_up(self, reason: str) -> None:
        """No run of these jobs can succeed: all workers stop, and the same command is in vain."""
        self.set("stop", reason)
        self.set("hopeless", True)

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


_OPEN = "WHERE state = 'waiting' AND asked = 1"
_MINE = "WHERE id = ? AND owner = ? AND state = 'running' AND tries + deaths = ?"
