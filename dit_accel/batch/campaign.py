"""A batch from its job file to its gallery."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dit_accel.batch.display import Display
from dit_accel.batch.fleet import Fleet
from dit_accel.batch.gallery import write_gallery
from dit_accel.batch.jobs import Job
from dit_accel.batch.manifest import DiskFull, Manifest
from dit_accel.batch.ray_fleet import RayFleet
from dit_accel.batch.reading import Parsed, gather
from dit_accel.batch.summary import Summary, summarize, write_results
from dit_accel.batch.together import Together
from dit_accel.batch.worker import Settings, Worker
from dit_accel.batch.writer import FULL
from dit_accel.generation import loading
from dit_accel.media.files import check_folder
from dit_accel.parallel import launcher as ranks

SHOW = ("auto", "json", "none")
GALLERY_EVERY = 30.0


def run(
    jobs: str | Path | Sequence[Job | Mapping[str, Any]],
    out: str | Path,
    *,
    settings: Settings | None = None,
    defaults: Mapping[str, Any] | None = None,
    pipe: Any = None,
    workers: int | None = None,
    gpus: str | None = None,
    device: str | None = None,
    check_every: int = 0,
    retry_failed: bool = False,
    ulysses: int = 1,
    ray: str | None = None,
    show: str = "auto",
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
        ray: address of a Ray cluster ("auto", "local") whose machines share `out`; `workers` are
            then started there, one on each GPU unless a number is given.
        show: "auto" (bars or lines on stderr), "json" (events on stdout) or "none".

    Raises ValueError, before anything is generated, for bad jobs (unless settings.keep_going), a
    folder that cannot be written, a model or device that is not there. Under `accelerate launch`
    every process works off the one queue.
    """
    settings = settings or Settings()
    _check(show, check_every)
    _check_where(ulysses, ray, workers, gpus, pipe)
    parsed = gather(jobs, defaults)
    _judge(parsed, settings)
    model = _name(pipe) if pipe is not None else loading.find_model(settings.model)
    elsewhere = pipe is not None or ray is not None
    devices = [] if elsewhere else _devices(workers or 1, gpus, device)
    manifest = _open(_folder(out))
    try:
        with _ranks() as rank, _space():
            if rank is None or rank == 0:
                _bind(manifest, model)
                problems = [(p.line, p.reason) for p in parsed.problems]
                manifest.set("settings", settings.to_dict())
                manifest.plan(
                    parsed.jobs, problems, check_every=check_every, retry_failed=retry_failed
                )
                _sweep(manifest)
        if ray is not None:
            with RayFleet(manifest, workers or 0, ray, device) as fleet:
                stopped = _attend(manifest, fleet, show)
        elif ulysses > 1:
            stopped = _work_together(manifest, settings, pipe, device, ulysses, show)
        else:
            stopped = _work(manifest, settings, pipe, devices, rank, show)
        return summarize(manifest, stopped) if rank else _finish(manifest, stopped)
    finally:
        manifest.close()


def _check(show: str, check_every: int) -> None:
    if show not in SHOW:
        raise ValueError(f"show is one of {', '.join(SHOW)}, not {show!r}")
    if check_every < 0:
        raise ValueError(f"check_every is the distance between checked jobs, not {check_every}")


def _check_where(
    ulysses: int, ray: str | None, workers: int | None, gpus: str | None, pipe: Any
) -> None:
    if workers is not None and workers < 1:
        raise ValueError(f"workers is at least 1, not {workers}")
    if ulysses != 1 and (workers is not None or gpus is not None or ray is not None):
        raise ValueError("with ulysses all processes make one clip: leave workers, gpus, ray out")
    if ray is not None and (gpus is not None or pipe is not None):
        raise ValueError("with ray the cluster says where: leave gpus and pipe out")
    try:
        ranks.check(ulysses)
    except ranks.Wanted:
        raise ValueError(
            f"ulysses={ulysses} needs {ulysses} processes: "
            f"start with `torchrun --nproc-per-node {ulysses} script.py`"
        ) from None


def _judge(parsed: Parsed, settings: Settings) -> None:
    if parsed.problems and not settings.keep_going:
        more = len(parsed.problems) - 20
        lines = [str(p) for p in parsed.problems[:20]] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(
            f"{len(parsed.problems)} job(s) refused (--keep-going does the others):\n  "
            + "\n  ".join(lines)
        )
    if not parsed.jobs:
        raise ValueError("there is no job to do")


def _name(pipe: Any) -> str:
    return getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__


def _folder(out: str | Path) -> Path:
    folder = check_folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made: {error.strerror}") from None
    return folder


def _open(folder: Path) -> Manifest:
    with _space():
        return Manifest(folder)


@contextmanager
def _space() -> Iterator[None]:
    """Before anything is generated, a full disk is the user's to mend."""
    try:
        yield
    except DiskFull as error:
        raise ValueError(f"{error.strerror}: free some and start again") from None


def _bind(manifest: Manifest, model: str) -> None:
    """One folder, one model: job ids do not name it."""
    before = manifest.get("model")
    if before not in (None, model) and manifest.counts()["done"]:
        raise ValueError(
            f"{manifest.folder} holds clips of {before}: choose another folder for {model}"
        )
    manifest.set("model", model)


def _devices(workers: int, gpus: str | None, device: str | None) -> list[str]:
    """One device for each worker."""
    import torch

    if gpus is None:
        loading.pick_device(device)
        count = torch.cuda.device_count() if device in (None, "cuda") else 0
        return [f"cuda:{i % count}" if count else device or "auto" for i in range(workers)]
    if device is not None:
        raise ValueError("give gpus or device, not both")
    numbers = range(torch.cuda.device_count()) if gpus == "all" else gpus.split(",")
    names = [f"cuda:{str(number).strip()}" for number in numbers]
    if not names:
        raise ValueError("there is no GPU here: leave gpus out")
    for name in names:
        loading.pick_device(name)
    return names * workers


@contextmanager
def _ranks() -> Iterator[int | None]:
    """This process's rank under a launcher, else None; all wait at the end of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    import torch.distributed as dist

    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
        dist.barrier()
    finally:
        if mine:
            dist.destroy_process_group()


def _work(
    manifest: Manifest,
    settings: Settings,
    pipe: Any,
    devices: list[str],
    rank: int | None,
    show: str,
) -> str:
    """Run the workers to the end; why they stopped before it, or ""."""
    with ExitStack() as stack:
        display = None
        if show != "none" and rank in (None, 0):
            display = stack.enter_context(Display(manifest, json_events=show == "json"))
        if pipe is None and rank is None:
            threads = _threads(devices)
            fleet = stack.enter_context(Fleet(manifest, devices, threads))
            try:
                return _watch(manifest, fleet, display)
            except DiskFull:
                return FULL
        if display is not None:
            stack.enter_context(_refreshing(display))
        if pipe is None:
            pipe, known = _load_for_rank(settings)
        else:
            known = loading.Defaults.from_pipeline(pipe)
        stopped = Worker(manifest, pipe, known, settings, child=False).run()
    return stopped or manifest.get("stop") or ""


def _work_together(
    manifest: Manifest, settings: Settings, pipe: Any, device: str | None, count: int, show: str
) -> str:
    """Every clip by all processes: the first has the worker, the others follow."""
    if pipe is None:
        pipe, known = loading.load_pipeline(
            settings.model, ranks.device(device), settings.dtype, settings.offload
        )
    else:
        known = loading.Defaults.from_pipeline(pipe)
    together = Together(pipe, count)
    if not together.leads:
        together.follow(pipe, known)
        return ""
    with ExitStack() as stack:
        if show != "none":
            display = stack.enter_context(Display(manifest, json_events=show == "json"))
            stack.enter_context(_refreshing(display))
        stopped = Worker(manifest, pipe, known, settings, False, together).run()
    together.dismiss()
    return stopped or manifest.get("stop") or ""


def _attend(manifest: Manifest, fleet: RayFleet, show: str) -> str:
    with ExitStack() as stack:
        display = None
        if show != "none":
            display = stack.enter_context(Display(manifest, json_events=show == "json"))
        try:
            return _watch(manifest, fleet, display)
        except DiskFull:
            return FULL


def _load_for_rank(settings: Settings) -> tuple[Any, loading.Defaults]:
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local}" if torch.cuda.is_available() else None
    return loading.load_pipeline(settings.model, device, settings.dtype, settings.offload)


def _threads(devices: list[str]) -> int:
    """Several workers share the cores, whatever they compute on; one takes PyTorch's choice."""
    if len(devices) < 2:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // len(devices))


def _watch(manifest: Manifest, fleet: Fleet | RayFleet, display: Display | None) -> str:
    page_due = time.monotonic() + GALLERY_EVERY
    while fleet.tend() and not fleet.stopped:
        if display is not None:
            display.update()
        if time.monotonic() > page_due:
            _publish(manifest)
            page_due = time.monotonic() + GALLERY_EVERY
        time.sleep(0.2)
    return fleet.stopped or manifest.get("stop") or ""


@contextmanager
def _refreshing(display: Display) -> Iterator[None]:
    """Keep the display up to date from a thread while this one works."""
    over = threading.Event()

    def refresh() -> None:
        while not over.wait(0.5):
            display.update()

    thread = threading.Thread(target=refresh, name="display", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _sweep(manifest: Manifest) -> None:
    """Remove what a killed process left half-written, once nobody works any more."""
    manifest.reclaim()
    if manifest.counts()["running"]:
        return
    for path in manifest.folder.glob(".*.part.*"):
        with suppress(FileNotFoundError):
            path.unlink()


def _publish(manifest: Manifest) -> None:
    """Gallery and results.jsonl: not worth a clip, so a full disk only leaves them as they were."""
    with suppress(OSError):
        write_gallery(manifest)
        write_results(manifest)


def _finish(manifest: Manifest, stopped: str) -> Summary:
    with suppress(DiskFull):
        _sweep(manifest)
    _publish(manifest)
    return summarize(manifest, stopped)
