"""One process, one pipeline: takes jobs from the manifest until none is left."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import dit_accel
from dit_accel.batch import memory, render
from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import Claim, DiskFull, Manifest
from dit_accel.batch.reading import Problem, listed
from dit_accel.batch.together import Apart, Together
from dit_accel.batch.weights import Weights
from dit_accel.batch.writer import FULL, Finished, Writer
from dit_accel.config import AccelConfig
from dit_accel.generation.boost import STOCK, Boost
from dit_accel.generation.facts import facts_of
from dit_accel.generation.loading import Defaults
from dit_accel.generation.offload import Offload
from dit_accel.generation.request import arguments
from dit_accel.generation.trained import Trained
from dit_accel.inputs.fields import check
from dit_accel.machine import is_device_lost, is_out_of_memory
from dit_accel.media import owner as owners

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


BEAT = 1.0
DISK_FULL = 74
DEVICE_LOST = 75
NO_MODEL = 78


@dataclass(frozen=True)
class Settings:
    """How workers work; the same for all of a run.

    Args:
        model, dtype, offload: as in `load_pipeline`.
        checkpoint: files, folders or ids for `load_checkpoint`.
        compile: torch.compile of the transformer's blocks.
        batch: clips in one call of the pipeline, at most.
        retries: further tries of a job that failed for no fault of its own.
        keep_going: when the model refuses a job, do the others all the same.
        timeout: seconds after which a job's worker is given up; 0 is never.
        wait_for_space: seconds to wait for space on a full disk.
        metadata: the clips carry what they were made from.
    """

    model: str | None = None
    checkpoint: list[str] | None = None
    dtype: str | None = None
    offload: bool | str = False
    compile: bool = False
    batch: int = 1
    retries: int = 1
    keep_going: bool = False
    timeout: float = 0.0
    wait_for_space: float = 300.0
    metadata: bool = True

    def __post_init__(self) -> None:
        check(self)
        Offload.named(self.offload)
        for name, least in (("batch", 1), ("retries", 0), ("timeout", 0), ("wait_for_space", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is at least {least}, not {getattr(self, name)}")

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


class DeviceLost(RuntimeError):
    """CUDA failed in a way that only a new process gets over."""

    exit_code = DEVICE_LOST


class Worker:
    """Serves the queue with one pipeline, until no job waits or runs elsewhere."""

    def __init__(
        self,
        manifest: Manifest,
        pipe: DiffusionPipeline,
        defaults: Defaults,
        trained: Trained | None,
        settings: Settings,
        child: bool,
        together: Together | None = None,
    ) -> None:
        self.manifest, self.pipe, self.defaults = manifest, pipe, defaults
        self.trained, self.settings, self.owner = trained, settings, owners.me()
        self.renders = render.render if together is None else together.render
        self.weights = Weights(pipe)
        self.device = pipe._execution_device
        self._taken: list[AccelConfig | Boost] = []
        self.savings = memory.Savings(pipe, self.device, settings.batch, settings.offload)
        self.heart = Heart(manifest, self.owner, str(self.device), settings.timeout, child)

    def run(self) -> str:
        """Work; the reason why it stopped before the end, or "".

        However it ends, no job stays with this worker. Raises DeviceLost.
        """
        try:
            with self.heart, Boost(self.settings.compile).compiled(self.pipe):
                self.manifest.note("ready", f"on {self.device}", self.owner)
                if not self._check():
                    return self.manifest.get("stop")
                return self._work()
        except DiskFull:  # a clip is waited for, see Writer; without the books nothing goes
            return FULL
        finally:
            self.weights.close()
            self._leave()

    def _work(self) -> str:
        s = self.settings
        writer = Writer(self.manifest, self.owner, self.defaults.fps, s.retries, s.wait_for_space)
        with render.remembered_prompts(self.pipe) as reused, writer as self.writer:
            self._serve_all()
        if reused() and not writer.stopped:
            self.manifest.note("prompts", f"{reused()} text encodings reused", self.owner)
        return writer.stopped

    def _serve_all(self) -> None:
        while self.writer.await_space():
            try:
                rows = self.manifest.claim(self.owner, self.savings.batch)
            except DiskFull:
                continue
            if rows:
                self._serve(rows)
            elif self._is_over():
                return
            else:  # others are at work; should one of them die, its jobs come here
                self.heart.say("idle", 0, None)
                self.heart.over.wait(0.5)

    def _is_over(self) -> bool:
        counts = self.manifest.counts()
        mine = self.manifest.ask(
            "SELECT COUNT(*) AS n FROM jobs WHERE state = 'running' AND owner = ?", self.owner
        )
        elsewhere = counts["running"] - mine[0]["n"]
        stopped = self.manifest.get("stop") is not None
        return stopped or (counts["waiting"] + elsewhere == 0 and mine[0]["n"] == 0)

    def _check(self) -> bool:
        """Before the first clip: does the model take every job? Those it refuses are failed; False
        when it takes none, or the others are not wanted alone: then the run is given up."""
        sql = "SELECT id, job, line FROM jobs WHERE state = 'waiting' AND asked = 1"
        found = [(row, self._refusal(json.loads(row["job"]))) for row in self.manifest.ask(sql)]
        refused = [(row, why) for row, why in found if why]
        every = len(refused) == sum(self.manifest.counts().values())
        if refused and (every or not self.settings.keep_going):
            others = "" if every else " (--keep-going does the others)"
            lines = listed([Problem(row["line"], why) for row, why in refused])
            self.manifest.give_up(f"the model refuses {len(refused)} job(s){others}:{lines}")
            return False
        for row, why in refused:
            self.manifest.refuse(row["id"], why)
        return True

    def _refusal(self, values: dict[str, object]) -> str:
        """Why the model cannot take this job, or ""."""
        try:
            job = Job.from_dict(values)
            request = replace(job.request(load=False), image=job.image)
            steps = arguments(self.pipe, self.defaults, request).get("num_inference_steps")
            boost = replace(job.boost, compile=self.settings.compile)
            if boost not in self._taken:
                boost.check(self.pipe)
                self._taken.append(boost)
            if job.config is not None and job.config not in self._taken:
                job.config.schedule.dense_at(0, steps)
                with dit_accel.accelerated(self.pipe, job.config):
                    self._taken.append(job.config)
        except ValueError as error:
            return str(error)
        return ""

    def _serve(self, rows: Sequence[Claim]) -> None:
        """Generate the rows of one claim; failures end in the manifest, not in an exception."""
        error = self._try(rows)
        if error is None:
            return
        reason = f"{type(error).__name__}: {_first_line(error)}"
        reason = _first_line(error) if isinstance(error, Apart) else reason
        if isinstance(error, Apart) or is_device_lost(error):
            for row in rows:
                self.manifest.fail(row, self.owner, reason, self.settings.retries)
            raise DeviceLost(reason)
        if is_out_of_memory(error):
            self._save_memory(rows, reason)
        elif isinstance(error, ValueError):  # a matter of the job, not of luck
            self._split(rows, _first_line(error), 0)
        else:
            self._split(rows, reason, self.settings.retries)

    def _try(self, rows: Sequence[Claim]) -> Exception | None:
        """None, or what went wrong, without its traceback: the frames in it hold the tensors."""
        try:
            jobs = [_as_planned(row) for row in rows]
            clips = self._render(jobs)
            dense = self._render(jobs, dense=True)[0] if rows[0].checked else None
        except Exception as error:
            traceback.print_exc()
            return error.with_traceback(None)
        finally:
            self.heart.rest()
        for row, clip in zip(rows, clips, strict=True):
            if clip.error:
                self.manifest.fail(row, self.owner, clip.error, self.settings.retries)
            else:
                self.writer.put(Finished(row, clip, dense))
        return None

    def _render(self, jobs: Sequence[Job], dense: bool = False) -> list[render.Clip]:
        title = jobs[0].output if len(jobs) == 1 else f"{jobs[0].output} and {len(jobs) - 1} more"
        self.heart.begin(title)
        clips = self.renders(self.weights, self.defaults, jobs, self.heart.say, dense)
        if self.savings.taken:
            for clip in clips:
                clip.report["after_out_of_memory"] = list(self.savings.taken)
        if not self.settings.metadata:
            return clips
        told = [self._facts(job, dense) for job in jobs]
        return [replace(clip, facts=facts) for clip, facts in zip(clips, told, strict=True)]

    def _facts(self, job: Job, dense: bool) -> dict[str, object]:
        """What a job's clip is made from."""
        image = {"file": job.image} if job.image else None
        request = replace(job.request(load=False), image=image)
        return facts_of(
            self.pipe,
            arguments(self.pipe, self.defaults, request),
            job.seed,
            None if dense else job.config,
            model=self.manifest.get("model"),
            fps=self.defaults.fps,
            boost=STOCK if dense else job.boost,
            sampler=job.sampler,
            trained=self.trained,
            command=self.manifest.get("command", ""),
        )

    def _split(self, rows: Sequence[Claim], reason: str, retries: int) -> None:
        """A call for several clips failed: do them one by one, to see which one it was."""
        if len(rows) == 1:
            self.manifest.fail(rows[0], self.owner, reason, retries)
            return
        for row in rows:
            self._serve([row])

    def _save_memory(self, rows: Sequence[Claim], reason: str) -> None:
        self.weights.close()  # what is moved now are the pipeline's own
        measure = self.savings.more()
        if measure is None:
            tried = ", ".join(self.savings.taken) or "nothing was left to give up"
            for row in rows:
                self.manifest.fail(row, self.owner, f"{reason} (in force: {tried})", 0)
            return
        self.manifest.note("step-down", f"out of memory: from here on {measure}", self.owner)
        while rows:  # the first of them may make the calls smaller still
            size = self.savings.batch
            self._serve(rows[:size])
            rows = rows[size:]

    def _leave(self) -> None:
        try:
            self.manifest.release(self.owner, "the worker stopped")
            self.manifest.leave(self.owner)
        except DiskFull:
            return  # the next run sees that this process is gone


class Heart(threading.Thread):
    """Says every second that the worker lives and what it does; ends an orphan or a job that hangs.

    `child`: this process was started by `run` and must not outlive it.
    """

    def __init__(
        self, manifest: Manifest, owner: str, device: str, timeout: float, child: bool
    ) -> None:
        super().__init__(name="heart", daemon=True)
        self.manifest, self.owner, self.device = manifest, owner, device
        self.timeout, self.child, self.parent = timeout, child, os.getppid()
        self.over = threading.Event()
        self._title, self._age = "", 0.0
        self._phase: tuple[str, int, int | None] = ("starting", 0, None)

    def __enter__(self) -> Heart:
        self._beat()
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()

    def begin(self, title: str) -> None:
        """A job begins; it is called `title`."""
        self._title, self._age = title, 0.0

    def rest(self) -> None:
        """No job is running: `timeout` does not count."""
        self._title = ""

    def say(self, phase: str, done: int, total: int | None) -> None:
        """What the worker is doing; the next beat carries it."""
        self._phase = (f"{self._title}: {phase}" if self._title else phase, done, total)

    def run(self) -> None:
        while not self.over.wait(BEAT):
            if self.child and os.getppid() != self.parent:
                os._exit(0)  # nobody collects the work any more: the next run takes the job
            self._age += BEAT
            self._beat()
            if self.child and self.timeout and self._title and self._age > self.timeout:
                self.manifest.bury(self.owner, f"it took longer than {self.timeout:g} s")
                os._exit(DEVICE_LOST)

    def _beat(self) -> None:
        try:
            self.manifest.beat(self.owner, self.device, *self._phase)
        except DiskFull:
            return  # on this host a live process keeps its jobs without beats


def _as_planned(row: Claim) -> Job:
    """The job of a row; ValueError where what it reads is no longer what was planned."""
    job = Job.from_dict(row.values)
    if job.id != row.id:
        raise ValueError(
            "what it is made from has changed since the run began (preset, learned weights, "
            "picture or LoRA): run the same command again"
        )
    return job


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
