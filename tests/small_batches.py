"""Batch runs in this process with a tiny pipeline, and what they leave."""

from dit_accel.batch import Settings, run
from dit_accel.batch.manifest import Manifest

SMALL = {"steps": 2, "height": 32, "width": 32, "frames": 5, "method": "dense"}
QUIET = Settings(retries=0, wait_for_space=0.05)


def go(pipe, out, jobs, settings=QUIET, **options):
    return run(jobs, out, pipe=pipe, settings=settings, defaults=SMALL, show="none", **options)


def events(out, kind):
    return [row["text"] for row in Manifest(out).ask("SELECT * FROM events WHERE kind = ?", kind)]


def files(out):
    return sorted(path.name for path in out.glob("*.mp4"))
