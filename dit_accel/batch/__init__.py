"""Many clips: a queue that survives, worker processes, a gallery. See docs/guide-batch.md."""

from dit_accel.batch.campaign import run
from dit_accel.batch.jobs import Job
from dit_accel.batch.summary import Summary
from dit_accel.batch.worker import Settings

__all__ = ["Job", "Settings", "Summary", "run"]
