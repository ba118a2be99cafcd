"""One clip over several processes: the first works off the manifest, the others do as it does.

Heads or keys are exchanged inside every attention call, so all processes must make the same call of
the pipeline at the same time. What goes wrong in one of them leaves the others waiting inside such
an exchange: then all end, and are started anew.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from dit_accel.batch import render
from dit_accel.batch.jobs import Job
from dit_accel.batch.weights import Weights
from dit_accel.generation.loading import Defaults
from dit_accel.generation.run import ProgressFn
from dit_accel.parallel.launcher import AGAIN
from dit_accel.parallel.sharing import share

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


_PATIENCE = timedelta(days=7)  # between two jobs there may be a full disk to wait for


# The values of some jobs and whether they run dense; None: there is nothing more to do.
Task = tuple[list[dict[str, object]], bool] | None


class Apart(RuntimeError):
    """The processes no longer do the same: only new ones get over that."""

    exit_code = AGAIN


class Together:
    """The processes of one pipeline, `pipe` being this one's copy of it."""

    def __init__(self, pipe: DiffusionPipeline, count: int, kv: str | None = None) -> None:
        share(pipe, count, kv=kv, anything=True)
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.leads = dist.get_rank() == 0

    def render(
        self,
        weights: Weights,
        defaults: Defaults,
        jobs: Sequence[Job],
        progress: ProgressFn,
        dense: bool = False,
    ) -> list[render.Clip]:
        """render.render, in all processes; called in the one that leads. Raises Apart."""
        try:
            self._tell(([job.to_dict() for job in jobs], dense))
            return render.render(weights, defaults, jobs, progress, dense)
        except Exception as error:
            raise Apart(f"{type(error).__name__}: {error}") from error

    def follow(self, pipe: DiffusionPipeline, defaults: Defaults) -> None:
        """Make every call that the first process makes, until it dismisses this one."""
        weights = Weights(pipe)
        while (task := self._tell(None)) is not None:
            values, dense = task
            jobs = [Job.from_dict(job) for job in values]
            try:
                render.render(weights, defaults, jobs, lambda phase, done, total: None, dense)
            except Exception as error:
                traceback.print_exc()
                raise Apart(f"{type(error).__name__}: {error}") from error
        weights.close()

    def dismiss(self) -> None:
        """There is nothing more to do."""
        self._tell(None)

    def _tell(self, task: Task) -> Task:
        """What the first process says, in all of them."""
        box = [task]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]
