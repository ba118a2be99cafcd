"""What a run shows: bars on a terminal, lines in a log, or JSON events for machines."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from dit_accel.batch.manifest import Manifest
from dit_accel.media import owner as owners

QUIET = ("started",)


class Display:
    """Reads what is new in the manifest at each `update` and shows it.

    json_events: write one JSON object a line to `stream` (stdout) instead; keys: time, event, job,
    output, owner, text, done, failed, waiting, running.
    """

    def __init__(
        self,
        manifest: Manifest,
        json_events: bool = False,
        console: Console | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.manifest, self.json = manifest, json_events
        self.console, self.stream = console or _plain(), stream or sys.stdout
        self._seen = manifest.ask("SELECT COALESCE(MAX(seq), 0) AS n FROM events")[0]["n"]
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: float | None = None  # the first job's start: loading is not the pace of work
        self._done_before = manifest.counts()["done"]

    def __enter__(self) -> Display:
        if not self.json and self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<58}", markup=False),
                BarColumn(24),
                MofNCompleteColumn(),
            )
            self._bars = Bars(*columns, TimeElapsedColumn(), console=self.console)
            self._tasks[""] = self._bars.add_task("jobs", total=None)
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.update()
        finally:
            if self._bars is not None:
                self._bars.stop()

    def update(self) -> None:
        """Show what has happened since the last call."""
        events = self.manifest.ask(
            "SELECT events.*, jobs.output, jobs.number FROM events LEFT JOIN jobs"
            " ON jobs.id = events.job WHERE seq > ? ORDER BY seq",
            self._seen,
        )
        counts = self.manifest.counts()
        for event in events:
            self._seen = event["seq"]
            self._show(event, counts)
        if self._bars is not None:
            self._draw(
                self._bars, counts, self.manifest.ask("SELECT * FROM workers ORDER BY owner")
            )

    def _show(self, event: sqlite3.Row, counts: dict[str, int]) -> None:
        if event["kind"] == "started" and self._began is None:
            self._began = event["time"]
        if self.json:
            print(json.dumps(_event(event, counts)), file=self.stream, flush=True)
        elif event["kind"] not in QUIET:
            ended = counts["done"] + counts["failed"]
            head = f"{ended}/{sum(counts.values())}"
            left = self._left(counts) if event["kind"] == "done" else ""
            what = event["output"] or ""
            self.console.print(
                f"{head:>9}  {event['kind']:<9} {what}{': ' if what else ''}"
                f"{event['text'] or ''}{left}",
                soft_wrap=True,
                markup=False,
                highlight=False,
                emoji=False,
            )

    def _left(self, counts: dict[str, int]) -> str:
        """How long the rest will take at the pace so far."""
        made = counts["done"] - self._done_before
        open_jobs = counts["waiting"] + counts["running"]
        if made < 1 or not open_jobs or self._began is None:
            return ""
        seconds = (time.time() - self._began) / made * open_jobs
        return f", about {_duration(seconds)} left"

    def _draw(self, bars: Bars, counts: dict[str, int], workers: Sequence[sqlite3.Row]) -> None:
        ended = counts["done"] + counts["failed"]
        failed = f", {counts['failed']} failed" if counts["failed"] else ""
        bars.update(
            self._tasks[""],
            completed=ended,
            total=sum(counts.values()),
            description=f"jobs{failed}{self._left(counts)}",
        )
        for name in set(self._tasks) - {"", *(w["owner"] for w in workers)}:
            bars.remove_task(self._tasks.pop(name))
        for worker in workers:
            name, text = worker["owner"], f"{worker['device']} {worker['phase']}"[-58:]
            if name not in self._tasks:
                self._tasks[name] = bars.add_task(text, total=worker["total"])
            bars.update(
                self._tasks[name],
                completed=worker["done"],
                total=worker["total"],
                description=text,
            )


def _plain() -> Console:
    """No letter of a prompt or a path is taken for markup."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def _event(event: sqlite3.Row, counts: dict[str, int]) -> dict[str, object]:
    worker = event["owner"] and owners.pid_of(event["owner"])
    return {
        "time": event["time"],
        "event": event["kind"],
        "job": event["job"],
        "output": event["output"],
        "worker": worker,
        "text": event["text"],
        **counts,
    }


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
