"""The output folder of a batch: one run at a time, and only what is ours is written over."""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil

from dit_accel.batch.books import NAME, DiskFull
from dit_accel.batch.gallery import PAGE
from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import Manifest
from dit_accel.batch.summary import RESULTS
from dit_accel.media import owner as owners
from dit_accel.media.files import make_folder
from dit_accel.media.names import SUFFIXES, same

LOGS = "logs"
PAGES = (PAGE, RESULTS)
BEAT = 5.0
HALF = re.compile(r"\..+\.(\d+)\.part\.\w+")  # of a file that is being written: its process


@contextmanager
def opened(out: str | Path) -> Iterator[Manifest]:
    """The manifest of a folder, both made where they were not.

    When the block is refused (ValueError) before anything was made, nothing of ours is left.
    """
    missing = [p for p in (Path(out), *Path(out).absolute().parents) if not os.path.lexists(p)]
    folder = make_folder(out)
    fresh = not os.path.lexists(folder / NAME)
    try:
        manifest = Manifest(folder)
    except DiskFull as error:
        _clear(folder, [], missing if fresh else [])
        raise ValueError(f"{error.strerror}: free some and start again") from None
    with closing(manifest):
        try:
            claim_pages(manifest)
            yield manifest
        except ValueError:
            used = "SELECT 1 FROM jobs WHERE state = 'done' UNION SELECT 1 FROM runs"
            if fresh and not manifest.ask(used):
                pages = manifest.get("pages", [])
                manifest.close()
                _clear(folder, [NAME, *pages], missing)
            raise


def _clear(folder: Path, names: Sequence[str], made: Sequence[Path]) -> None:
    """Take back what a refused run has put into a folder that held nothing of ours."""
    logs = list((folder / LOGS).glob("worker-*.log")) if LOGS in names else []
    for path in (*logs, *(folder / name for name in names)):
        with suppress(OSError):
            path.rmdir() if path.name == LOGS else path.unlink()
    for path in made:
        with suppress(OSError):  # somebody else's files are in it
            path.rmdir()


def claim_pages(manifest: Manifest) -> None:
    """The page, the results and the logs are ours from now on; ValueError where others' stand."""
    if manifest.get("pages"):
        return
    folder = manifest.folder
    if not manifest.ask("SELECT 1 FROM jobs LIMIT 1"):  # no earlier release has been here
        logs = folder / LOGS
        taken = [folder / name for name in PAGES if os.path.lexists(folder / name)]
        taken += [logs] if os.path.lexists(logs) and not logs.is_dir() else []
        taken += sorted(logs.glob("worker-*.log"))
        if taken:
            raise ValueError(
                f"{taken[0]} was not written by a batch: move it away, or choose another folder"
            )
    manifest.set("pages", [*PAGES, LOGS])


def clashes(manifest: Manifest, jobs: Sequence[tuple[int, Job]]) -> Iterator[tuple[int, str]]:
    """(line, reason) of each job whose file would take the place of one that is not its own."""
    folder = manifest.folder
    rows = manifest.ask("SELECT id, output, state FROM jobs")
    theirs = {same(row["output"]): row["id"] for row in rows if row["state"] == "done"}
    output = {row["id"]: row["output"] for row in rows}
    begun = {row["job"] for row in manifest.ask("SELECT job FROM events WHERE kind = 'started'")}
    standing = {same(entry.name): entry.name for entry in os.scandir(folder)}
    for line, job in jobs:
        if theirs.get(same(job.output), job.id) != job.id:
            yield line, f"{job.output} is the name of another clip in {folder}"
        elif not (job.id in begun and output.get(job.id) == job.output):
            ends = [*SUFFIXES, *(f".dense{suffix}" for suffix in SUFFIXES)]
            found = [standing.get(same(job.output + end)) for end in ends]
            names = [name for name in found if name is not None]
            if names and theirs.get(same(job.output)) != job.id:
                yield line, f"{names[0]} stands in {folder} and is not of this batch"


def sweep(manifest: Manifest) -> None:
    """Remove what a killed process left half-written, once nobody works any more."""
    manifest.reclaim()
    if manifest.ask("SELECT 1 FROM jobs WHERE state = 'running' LIMIT 1"):
        return
    for path in manifest.folder.glob(".*.part.*"):
        found = HALF.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            with suppress(FileNotFoundError):
                path.unlink()


class Hold(threading.Thread):
    """This run has the folder for the length of a block, and says so to other machines.

    asked: what the run asks for; a run that asks for the same may join in.
    """

    def __init__(self, manifest: Manifest, asked: str) -> None:
        super().__init__(name="hold", daemon=True)
        self.manifest, self.asked, self.id = manifest, asked, uuid.uuid4().hex
        self.over = threading.Event()

    def __enter__(self) -> Hold:
        self.manifest.enter(self.id, owners.me(), self.asked)
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()
        with suppress(DiskFull):  # the next run sees that this process is gone
            self.manifest.exit(self.id)

    def run(self) -> None:
        while not self.over.wait(BEAT):
            with suppress(DiskFull):
                self.manifest.stay(self.id)
