"""Who asked for what: one job per visitor, files in one folder, the oldest removed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

from dit_accel.app import outcome, stage, views
from dit_accel.app.ask import Ask
from dit_accel.app.stop import Cancelled
from dit_accel.app.studio import News, Pair, Run, Studio

KEPT = 32


def url(folder: Path) -> str:
    """Where the page finds the files of a folder that it may serve."""
    return f"gradio_api/file={folder}"


@dataclass
class Desk:
    """Between the page and the studio. `folder` is the only place that files are written to."""

    studio: Studio
    folder: Path
    _jobs: dict[str, Event] = field(default_factory=dict, init=False)
    _folders: list[Path] = field(default_factory=list, init=False)
    _lock: Any = field(default_factory=Lock, init=False)

    def cancel(self, visitor: str) -> None:
        """Stop the visitor's job, if there is one."""
        with self._lock:
            job = self._jobs.pop(visitor, None)
        if job is not None:
            job.set()

    def serve(self, visitor: str, ask: Ask) -> Iterator[tuple[dict[str, Any], str | None]]:
        """Yield (value of the stage, results as HTML once they are there).

        A visitor's new job ends the one before. Raises ValueError for a request the model cannot
        serve, Cancelled when the job was cancelled.
        """
        self.cancel(visitor)
        cancel = Event()
        with self._lock:
            self._jobs[visitor] = cancel
        folder = self._new_folder()
        value = stage.waiting(ask)
        try:
            for item in self.studio.run(ask, cancel):
                if isinstance(item, News):
                    value = stage.moved(value, item)
                    yield value, None
                elif isinstance(item, Run):
                    value = self._finished(value, item, folder)
                    yield value, None
                else:
                    yield self._done(item, folder)
        finally:
            with self._lock:
                if self._jobs.get(visitor) is cancel:
                    del self._jobs[visitor]

    def _finished(self, value: dict[str, Any], run: Run, folder: Path) -> dict[str, Any]:
        fps = self.studio.fps
        name = outcome.clip(run, fps, folder)
        return stage.finished(value, run, f"{url(folder)}/{name}", fps)

    def _done(self, pair: Pair, folder: Path) -> tuple[dict[str, Any], str]:
        data = outcome.record(pair, folder)
        return stage.recorded(data, url(folder)), views.results(data, url(folder))

    def _new_folder(self) -> Path:
        with self._lock:
            folder = self.folder / uuid.uuid4().hex
            folder.mkdir(parents=True)
            self._folders.append(folder)
            old, self._folders = self._folders[:-KEPT], self._folders[-KEPT:]
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        return folder


__all__ = ["Cancelled", "Desk", "url"]
