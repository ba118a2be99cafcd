"""A batch from its job file to its gallery."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.batch.folder import Hold, clashes, opened, sweep
from dit_accel.batch.gallery import publish
from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import DiskFull, Manifest
from dit_accel.batch.model import BESIDE, absolute
from dit_accel.batch.model import listed as listed_files
from dit_accel.batch.places import Place, launched
from dit_accel.batch.reading import Parsed, Problem, gather, listed
from dit_accel.batch.summary import Summary, summarize
from dit_accel.batch.worker import Settings
from dit_accel.generation import loading

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


def run(
    jobs: str | Path | Sequence[Job | Mapping[str, object]],
    out: str | Path,
    *,
    settings: Settings | None = None,
    defaults: Mapping[str, object] | None = None,
    pipe: DiffusionPipeline | None = None,
    workers: int | None = None,
    gpus: str | None = None,
    device: str | None = None,
    check_every: int = 0,
    retry_failed: bool = False,
    ulysses: int = 1,
    kv: str | None = None,
    ray: str | None = None,
    show: str = "auto",
    command: str = "",
) -> Summary:
    """Do all jobs, or what is left of them from an earlier run, and write a gallery.

    Args:
        jobs: a job file (.jsonl, .csv, .txt), or Jobs and mappings of their keys; see docs.
        out: the folder of the clips and the manifest. The same call again goes on where it stopped.
        settings: model, retries and the like.
        defaults: keys for jobs that do not have them; a list multiplies.
        pipe: a loaded pipeline to work with in this process, instead of worker processes.
        workers: processes on `device`, or on each GPU of `gpus` ("all" or "0,2").
        check_every: every n-th job also runs dense and reports how far it is from that.
        retry_failed: try jobs again that failed in an earlier run.
        ulysses: processes that make each clip together; a launcher must have started them.
        kv: "gather" or "ring", where they share queries instead of heads (see parallel.share).
        ray: address of a Ray cluster ("auto", "local") whose machines share `out`; `workers` are
            then started there, one on each GPU unless a number is given.
        show: "auto" (bars or lines on stderr), "json" (events on stdout) or "none".
        command: the line that was typed; the clips carry it.

    Raises ValueError for bad jobs (unless settings.keep_going), a folder that cannot be written, is
    in use by another batch or holds others' files of these names, a model or device that is not
    there, and jobs that the model cannot take: then nothing is left that was not there. Under
    `accelerate launch` every process works off the one queue; the same call may join in.
    """
    asked = Asked(settings or Settings(), check_every, retry_failed, command)
    where = Place(pipe, workers, gpus, device, ulysses, kv, ray, show)
    parsed = gather(jobs, _with_checkpoint(defaults, asked.settings.checkpoint))
    asked.judge(parsed)
    where.judge(parsed)
    asked = asked.of_one_checkpoint(parsed, pipe is not None)
    model = (
        _name(where.pipe)
        if where.pipe is not None
        else absolute(loading.find_model(asked.settings.model))
    )
    where.check(asked.settings)
    devices = where.devices(asked.settings.dtype)
    with opened(out) as manifest:
        return asked.carry_out(manifest, parsed, model, where, devices)


@dataclass(frozen=True)
class Asked:
    """What a run is to do, beside its jobs."""

    settings: Settings
    check_every: int
    retry_failed: bool
    command: str

    def __post_init__(self) -> None:
        if self.check_every < 0:
            raise ValueError(
                f"check_every is the distance between checked jobs, not {self.check_every}"
            )

    def judge(self, parsed: Parsed) -> None:
        """ValueError for jobs that are refused, unless the others are to be done, and for none."""
        if parsed.problems and not self.settings.keep_going:
            raise ValueError(
                f"{len(parsed.problems)} job(s) refused (--keep-going does the others):"
                + listed(parsed.problems)
            )
        if not parsed.jobs:
            raise ValueError("there is no job to do" + listed(parsed.problems))

    def of_one_checkpoint(self, parsed: Parsed, loaded: bool) -> Asked:
        """With the checkpoint that the jobs name; ValueError where they differ, or where a pipeline
        is given that has its own weights."""
        named = {job.checkpoint: line for line, job in parsed.jobs}
        if len(named) > 1:
            (first, a), (second, b), *_ = named.items()
            raise ValueError(
                f"line {a} has the checkpoint {first} and line {b} {second}: a batch runs one, "
                "make two of them"
            )
        text = next(iter(named))
        if text is not None and loaded:
            raise ValueError(
                "the pipeline is loaded already: load_checkpoint(pipe, …) before, and leave the "
                "checkpoint out"
            )
        files = None if text is None else listed_files(text)
        return replace(self, settings=replace(self.settings, checkpoint=files))

    def digest(self, parsed: Parsed, model: str) -> str:
        """The same for runs that may work side by side in one folder."""
        ids = sorted(job.id for _, job in parsed.jobs)
        facts = [ids, model, self.check_every, self.settings.to_dict()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def carry_out(
        self, manifest: Manifest, parsed: Parsed, model: str, where: Place, devices: list[str]
    ) -> Summary:
        """Plan, work and sum up. Raises ValueError where no such run can succeed."""
        with ExitStack() as stack:
            with launched() as rank, _space():  # at its end all processes wait for the plan
                if not rank:
                    stack.enter_context(Hold(manifest, self.digest(parsed, model)))
                    self._plan(manifest, parsed, model)
            stopped = where.work(manifest, self.settings, devices, rank)
            if rank:
                return summarize(manifest, stopped)
            if manifest.get("hopeless"):
                raise ValueError(manifest.get("stop"))
            return _finish(manifest, stopped)

    def _plan(self, manifest: Manifest, parsed: Parsed, model: str) -> None:
        _bind(manifest, model, self.settings.dtype or "its own dtype")
        sweep(manifest)
        parsed = _without(parsed, dict(clashes(manifest, parsed.jobs)))
        self.judge(parsed)
        manifest.set("settings", self.settings.to_dict())
        manifest.set("command", self.command)
        problems = [(p.line, p.reason) for p in parsed.problems]
        manifest.plan(
            parsed.jobs, problems, check_every=self.check_every, retry_failed=self.retry_failed
        )


def _with_checkpoint(
    defaults: Mapping[str, object] | None, files: Sequence[str] | None
) -> Mapping[str, object] | None:
    """The keys of jobs that do not have them, the run's checkpoint among them."""
    if not files:
        return defaults
    return {**(defaults or {}), "checkpoint": BESIDE.join(map(absolute, files))}


def _without(parsed: Parsed, refused: Mapping[int, str]) -> Parsed:
    """The jobs of other lines than these."""
    problems = [Problem(line, reason) for line, reason in refused.items()]
    kept = [(line, job) for line, job in parsed.jobs if line not in refused]
    return Parsed(kept, sorted([*parsed.problems, *problems], key=lambda p: p.line))


@contextmanager
def _space() -> Iterator[None]:
    """Before anything is generated, a full disk is the user's to mend."""
    try:
        yield
    except DiskFull as error:
        raise ValueError(f"{error.strerror}: free some and start again") from None


def _name(pipe: DiffusionPipeline) -> str:
    return getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__


def _bind(manifest: Manifest, model: str, dtype: str) -> None:
    """One folder, one model in one dtype: job ids do not name them."""
    made = manifest.ask("SELECT 1 FROM jobs WHERE state = 'done' LIMIT 1")
    for key, value in (("model", model), ("dtype", dtype)):
        before = manifest.get(key)
        same = before is None or absolute(before) == absolute(value)
        if made and not same:
            raise ValueError(
                f"{manifest.folder} holds clips of {before}: choose another folder for {value}"
            )
        manifest.set(key, value)


def _finish(manifest: Manifest, stopped: str) -> Summary:
    with suppress(DiskFull):
        sweep(manifest)
    publish(manifest)
    return summarize(manifest, stopped)
