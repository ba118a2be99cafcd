"""Where a batch is worked off: worker processes, this process, a launcher's, a Ray cluster."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dit_accel.batch import model
from dit_accel.batch.display import Display
from dit_accel.batch.fleet import Fleet
from dit_accel.batch.gallery import publish
from dit_accel.batch.manifest import DiskFull, Manifest
from dit_accel.batch.ray_fleet import RayFleet
from dit_accel.batch.reading import Parsed
from dit_accel.batch.together import Together
from dit_accel.batch.worker import Settings, Worker
from dit_accel.batch.writer import FULL
from dit_accel.generation import loading
from dit_accel.generation.trained import Trained
from dit_accel.parallel import launcher

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


SHOW = ("auto", "json", "none")
GALLERY_EVERY = 30.0


@dataclass(frozen=True)
class Place:
    """Where and how a run works; see `campaign.run`. Raises ValueError for what excludes itself."""

    pipe: DiffusionPipeline | None = None
    workers: int | None = None
    gpus: str | None = None
    device: str | None = None
    ulysses: int = 1
    kv: str | None = None
    ray: str | None = None
    show: str = "auto"

    def __post_init__(self) -> None:
        if self.show not in SHOW:
            raise ValueError(f"show is one of {', '.join(SHOW)}, not {self.show!r}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is at least 1, not {self.workers}")
        several = (self.workers, self.gpus, self.ray) != (None, None, None)
        if self.ulysses != 1 and several:
            raise ValueError(
                "with ulysses all processes make one clip: leave workers, gpus, ray out"
            )
        if self.ray is not None and (self.gpus is not None or self.pipe is not None):
            raise ValueError("with ray the cluster says where: leave gpus and pipe out")
        try:
            launcher.check(self.ulysses, self.kv)
        except launcher.Wanted:
            raise ValueError(
                f"ulysses={self.ulysses} needs {self.ulysses} processes: "
                f"start with `torchrun --nproc-per-node {self.ulysses} script.py`"
            ) from None

    def judge(self, parsed: Parsed) -> None:
        """ValueError for a job that cannot run here."""
        for line, job in parsed.jobs if self.kv is not None else ():
            if job.config is not None and job.config.prune is not None:
                raise ValueError(
                    f"line {line} prunes tokens, which are shared by heads: leave kv or prune out"
                )

    def check(self, settings: Settings) -> None:
        """ValueError for what has no effect here."""
        if _started() and (self.workers, self.gpus) != (None, None):
            raise ValueError("a launcher has started the processes: leave workers and gpus out")
        if settings.timeout and (_started() or self.pipe is not None or self.ulysses > 1):
            raise ValueError(
                "timeout ends a worker process that hangs, and this run starts none of its own "
                "(a launcher, ulysses or a loaded pipeline): leave it out"
            )

    def devices(self, dtype: str | None) -> list[str]:
        """One device for each worker process; ValueError for one, or a dtype, that is not there."""
        if self.pipe is not None:
            return []
        where = [] if self.ray is not None else _devices(self.workers or 1, self.gpus, self.device)
        loading.pick_dtype(dtype, loading.pick_device("cpu"))
        return where

    def work(
        self, manifest: Manifest, settings: Settings, devices: list[str], rank: int | None
    ) -> str:
        """Work off the queue; why that stopped before the end, or ""."""
        if self.ray is not None:
            with RayFleet(manifest, self.workers or 0, self.ray, self.device) as fleet:
                return _attend(manifest, fleet, self.show)
        if self.ulysses > 1:
            return _work_together(manifest, settings, self)
        return _work(manifest, settings, self.pipe, devices, rank, self.show)


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


def _started() -> bool:
    """Has a launcher started this process, and others?"""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def launched() -> Iterator[int | None]:
    """This process's rank under a launcher, else None; all wait at the end of the block."""
    if not _started():
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
    pipe: DiffusionPipeline | None,
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
            opened = _load_for_rank(settings)
        else:
            opened = pipe, loading.Defaults.from_pipeline(pipe), None
        stopped = Worker(manifest, *opened, settings, child=False).run()
    return stopped or manifest.get("stop") or ""


def _work_together(manifest: Manifest, settings: Settings, place: Place) -> str:
    """Every clip by all processes: the first has the worker, the others follow."""
    pipe, show, trained = place.pipe, place.show, None
    if pipe is None:
        pipe, known, trained = model.load(settings, launcher.device(place.device))
    else:
        known = loading.Defaults.from_pipeline(pipe)
    together = Together(pipe, place.ulysses, place.kv)
    if not together.leads:
        together.follow(pipe, known)
        return ""
    with ExitStack() as stack:
        if show != "none":
            display = stack.enter_context(Display(manifest, json_events=show == "json"))
            stack.enter_context(_refreshing(display))
        stopped = Worker(manifest, pipe, known, trained, settings, False, together).run()
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


def _load_for_rank(
    settings: Settings,
) -> tuple[DiffusionPipeline, loading.Defaults, Trained | None]:
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = f"cuda:{local}" if torch.cuda.is_available() else None
    return model.load(settings, device)


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
            publish(manifest)
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
