"""Who asked for what: a queue with places, one job at a time, files in one folder, the oldest
removed."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from dit_accel.app import outcome, stage
from dit_accel.app.ask import Ask, BadField, Limits
from dit_accel.app.cost import Plan, told
from dit_accel.app.stop import Cancelled, Leash
from dit_accel.app.studio import News, Run, Studio
from dit_accel.config import AccelConfig
from dit_accel.inputs.data import read_object
from dit_accel.media.files import elsewhere
from dit_accel.media.pictures import read_picture
from dit_accel.methods.selectors import opens_a_file

KEPT = 32
SENT = 64  # pictures and presets of visitors
TOKEN = re.compile(r"[0-9a-f]{32}")


class Full(ValueError):
    """No place is free; the message says whose places they are."""


@dataclass(eq=False)
class Job:
    """One request from its place in the queue to its files.

    value: of the stage. state: "waiting", "running", "done", "cancelled" or "failed".
    note: why it failed. version: grows with every change.
    """

    id: str
    ask: Ask
    asked: dict[str, Any]
    client: str
    folder: Path
    plan: Plan
    value: dict[str, Any]
    leash: Leash
    state: str = "waiting"
    note: str = ""
    record: dict[str, Any] | None = None
    version: int = 0
    began: float = 0.0
    denoising: tuple[str, float] = ("", 0.0)
    sides: list[str] = field(default_factory=list)

    @property
    def base(self) -> str:
        """Where the page finds its files."""
        return f"jobs/{self.id}/files"

    @property
    def over(self) -> bool:
        return self.state in ("done", "cancelled", "failed")

    def change(self, **values: Any) -> None:
        """New values, seen by whoever follows the job."""
        for name, value in values.items():
            setattr(self, name, value)
        self.version += 1

    def left(self) -> float:
        """Seconds until it is done, from its plan and what was seen of its steps; 0 once it takes
        longer than was planned and no step was seen."""
        if self.state != "running":
            return self.plan.total if self.state == "waiting" else 0.0
        side, share = self.denoising[0], self._share()
        loop = {"left": self.plan.left, "right": self.plan.right}
        if not side or not share:
            return max(self.plan.total - (time.monotonic() - self.began), 0.0)
        spent = time.monotonic() - self.denoising[1]
        here = spent / share - spent
        if side == "left":
            here += self.plan.right * spent / share / max(loop["left"], 1e-9)
        return here + self.plan.rest * (0.75 if side == "left" else 0.4)

    def _share(self) -> float:
        return float(self.value[self.denoising[0]].get("share") or 0) if self.denoising[0] else 0.0


@dataclass
class Desk:
    """Between the page and the studio. `folder` is the only place that files are written to."""

    studio: Studio
    folder: Path
    limits: Limits = field(default_factory=Limits)
    grace: float = 20.0
    _jobs: dict[str, Job] = field(default_factory=dict, init=False)
    _queue: list[Job] = field(default_factory=list, init=False)
    _bell: Condition = field(default_factory=Condition, init=False)
    _worker: Thread | None = field(default=None, init=False)
    _open: bool = field(default=True, init=False)

    def start(self, warm: bool = True) -> None:
        """Begin to serve; `warm` loads the embedded model before anybody asks for it."""
        if self._worker is None:
            self._worker = Thread(target=self._work, args=(warm,), daemon=True)
            self._worker.start()

    def stop(self) -> None:
        """End whatever runs, and serve nothing more."""
        self._open = False
        for job in list(self._jobs.values()):
            job.leash.set()
        with self._bell:
            self._bell.notify_all()
        if self._worker is not None:
            self._worker.join()

    def take(self, ask: Ask, asked: dict[str, Any], client: str) -> Job:
        """`submit`, if the model can make the prompt; BadField where it cannot."""
        if trouble := told(self.studio, ask)["refused"]:
            raise BadField("prompt", trouble)
        return self.submit(ask, asked, client)

    def submit(self, ask: Ask, asked: dict[str, Any], client: str) -> Job:
        """A place in the queue. Raises BadField for more work than is allowed, Full."""
        full = self.studio.filled(ask)
        with self._bell:
            waiting = [job for job in self._queue if job.state == "waiting"]
            if len(waiting) >= self.limits.queue:
                raise Full(f"The queue is full: {len(waiting)} are waiting. Try again in a while.")
            mine = sum(job.client == client for job in waiting)
            if mine >= self.limits.places:
                raise Full(
                    f"{mine} of your runs are waiting already; one address has "
                    f"{self.limits.places} places. Wait for one, or cancel it."
                )
            name = uuid.uuid4().hex
            job = Job(
                name,
                ask,
                asked,
                client,
                self.folder / name,
                self.studio.plan(full),
                stage.waiting(full),
                Leash(self.grace),
            )
            self._jobs[name] = job
            self._queue.append(job)
            self._bell.notify_all()
        self._forget()
        return job

    def job(self, name: str) -> Job | None:
        """The job of this name, unless it was forgotten."""
        return self._jobs.get(name)

    def place(self, job: Job) -> tuple[int, float]:
        """(how many are before it, seconds until its turn)."""
        with self._bell:
            before = self._queue[: self._queue.index(job)] if job in self._queue else []
        return len(before), sum(other.left() for other in before)

    def news(self, job: Job) -> dict[str, Any]:
        """What whoever follows a job sees now."""
        before, until = self.place(job)
        said = stage.said(job.state, job.value, before, until, job.left())
        return {
            "state": job.state,
            "note": job.note,
            "value": job.value,
            "before": before,
            "said": said,
        }

    def cancel(self, job: Job) -> None:
        """Stop a job, or take it out of the queue."""
        job.leash.set()
        with self._bell:
            if job.state == "waiting" and job in self._queue:
                self._queue.remove(job)
                job.change(state="cancelled", value=stage.stopped(job.value, "cancelled"))

    def keep(self, kind: str, data: bytes) -> str:
        """Keep what a visitor sent, a "picture" or a "preset"; its token. ValueError for another
        thing."""
        token = hashlib.sha256(data).hexdigest()[:32]
        folder = self.folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{token}{'.json' if kind == 'preset' else '.png'}"
        raw = folder / f"{uuid.uuid4().hex}.part"
        try:
            raw.write_bytes(data)
            if kind == "picture":
                picture = read_picture(raw)
                picture.thumbnail((2 * self.limits.side,) * 2)
                picture.save(path)
            else:
                self._check_preset(raw)
                raw.replace(path)
        except ValueError as error:
            text = str(error).replace(str(raw), "you sent")
            raise BadField("image" if kind == "picture" else "open", f"The {text}.") from None
        finally:
            raw.unlink(missing_ok=True)
        for old in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime)[:-SENT]:
            old.unlink(missing_ok=True)
        return token

    def _check_preset(self, path: Path) -> None:
        data = read_object(path, "preset")
        if self.limits.public:
            _check_public(data)
        AccelConfig.from_dict(data)

    def opened(self, kind: str, token: str) -> Path:
        """The file behind a token; BadField where there is none."""
        end = ".json" if kind == "preset" else ".png"
        path = self.folder / kind / f"{token}{end}"
        if not TOKEN.fullmatch(token) or not path.is_file():
            raise BadField("open", f"That {kind} is no longer here: open it again.")
        return path

    def _work(self, warm: bool) -> None:
        if warm:
            try:
                self.studio.warm()
            except Exception:  # whoever asks for this model is told
                traceback.print_exc()
        while self._open:
            with self._bell:
                self._bell.wait_for(lambda: self._queue or not self._open)
                if not self._queue:
                    return
                job = self._queue[0]
            # in a thread of its own, with which its libraries' caches go
            run = Thread(target=self._serve, args=(job,), daemon=True)
            run.start()
            run.join()
            with self._bell:
                if job in self._queue:
                    self._queue.remove(job)

    def _serve(self, job: Job) -> None:
        try:
            if job.leash.is_set():
                raise Cancelled
            job.folder.mkdir(parents=True, exist_ok=True)
            job.change(state="running", began=time.monotonic())
            pair = self.studio.run(job.ask, job.leash, _listener(job))
            record = _written(job, lambda folder: outcome.record(pair, folder, job.asked))
            job.change(record=record, value=stage.recorded(record, job.base), state="done")
        except Cancelled:
            job.change(state="cancelled", value=stage.stopped(job.value, "cancelled"))
        except Exception as error:  # whatever a model does, the page goes on
            if not isinstance(error, ValueError):
                traceback.print_exc()
            note = sentence(error)
            job.change(state="failed", note=note, value=stage.stopped(job.value, "failed"))

    def _forget(self) -> None:
        """Remove the files of the oldest jobs."""
        with self._bell:
            over = [job for job in self._jobs.values() if job.over]
            old = over[: max(0, len(over) - KEPT)]
            for job in old:
                del self._jobs[job.id]
        for job in old:
            shutil.rmtree(job.folder, ignore_errors=True)


def _check_public(preset: dict[str, Any]) -> None:
    """ValueError, before any file is opened, for what the form of a public page leaves out."""
    method = preset.get("method")
    if isinstance(method, dict) and method.get("weights"):
        raise ValueError("preset names weights of its own, which a public page does not read")
    if preset.get("dense") is not None:
        raise ValueError("preset names a backend of dense attention: a public page leaves it out")
    if any(map(opens_a_file, _texts(preset))):
        raise ValueError("preset names a file, which a public page does not read")


def _texts(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else ():
        yield from _texts(inner)
    for inner in value if isinstance(value, list) else ():
        yield from _texts(inner)


def _listener(job: Job) -> Callable[[News | Run], None]:
    """What a job's stage shows of the studio's news."""

    def hear(item: News | Run) -> None:
        if isinstance(item, News):
            if item.phase == "denoise" and item.done == 0:
                job.denoising = (item.side, time.monotonic())
            job.change(value=stage.moved(job.value, item))
            return
        name = _written(job, lambda folder: outcome.clip(item, folder))
        job.change(value=stage.finished(job.value, item, f"{job.base}/{name}", item.fps))

    return hear


def _written(job: Job, write: Callable[[Path], Any]) -> Any:
    """What `write` makes of the job's folder, or, where that takes no files, of another one that
    the job has from then on."""
    try:
        return write(job.folder)
    except OSError as error:
        kept = elsewhere()
        if kept is None:
            why = error.strerror or "it takes no files"
            raise ValueError(f"The server's disk cannot be written ({why}): make room") from error
        for path in job.folder.glob("*.*"):
            shutil.copy(path, kept)
        job.folder = kept
        return write(kept)


def sentence(error: BaseException) -> str:
    """An error as a visitor reads it: only ours are meant for visitors' eyes."""
    text = str(error).strip()
    if not isinstance(error, ValueError) or not text:
        text = f"the run failed ({type(error).__name__}); the server's log says why"
    return f"{text[0].upper()}{text[1:].rstrip('.')}."
