"""One process of multi_gpu.py and its GPU; one generation there, timed step by step."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from multi_gpu_cases import course_of
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dit_accel.api import accelerated
from dit_accel.bench.rows import switched_on

MARK = "ROW "


@dataclass(frozen=True)
class Place:
    """This process among all."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, dry: bool) -> Place:
        rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cpu") if dry else torch.device("cuda", rank)
        if not dry:
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if dry else "nccl", timeout=timedelta(minutes=10))
        return cls(rank, dist.get_world_size(), device)

    def all(self, value: Any) -> list[Any]:
        """What every process says."""
        said = [None] * self.world
        dist.all_gather_object(said, value)
        return said

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def say(self, row: dict[str, Any]) -> None:
        if self.rank == 0:
            print(MARK + json.dumps(row), flush=True)

    def clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@dataclass
class Run:
    """One generation: seconds of each step, and the model's output in the last of the first cycle.

    A cycle has one step of each kind of its row. communicating, computing: shares of the last
    cycle; what they leave of 1, the GPU has waited for the host.
    """

    kinds: tuple[str, ...]
    seconds: list[float] = field(default_factory=list)
    output: Tensor | None = None
    kept: float | None = None
    unplanned: dict[str, int] = field(default_factory=dict)
    implementations: list[str] = field(default_factory=list)
    communicating: float | None = None
    computing: float | None = None
    peak: int = 0

    def facts(self, rounds: int, scale: float) -> dict[str, Any]:
        """JSON-able, seconds of a whole step: the first cycle compiles, and is thrown away."""
        timed = self.seconds[len(self.kinds) : len(self.kinds) * (rounds + 1)]
        by = {kind: timed[n :: len(self.kinds)] for n, kind in enumerate(self.kinds)}
        return {
            "seconds": {k: round(scale * statistics.median(of), 5) for k, of in by.items() if of},
            "spread": {k: round(scale * (max(of) - min(of)), 5) for k, of in by.items() if of},
            "kept": None if self.kept is None else round(self.kept, 4),
            "unplanned": self.unplanned,
            "implementations": self.implementations,
            "communicating": self.communicating,
            "computing": self.computing,
            "peak_gib": round(self.peak / 2**30, 2),
        }


def generate(
    place: Place,
    pipe: Any,
    call: dict[str, Any],
    name: str,
    cycles: int,
    of: int,
    dense: bool = False,
) -> Run:
    """The first `cycles` of `of` cycles of steps; the last of them under the profiler, for the
    shares. dense: a stock pipeline runs through `accelerate`, too, where keys travel by it."""
    row, course = course_of(name, of)
    run, watch = Run(row.kinds() or ("dense",)), cycles == of
    stride, shown, last = len(run.kinds), [], time.perf_counter()
    activity = ProfilerActivity.CUDA if place.device.type == "cuda" else ProfilerActivity.CPU
    profiler = profile(activities=[activity])

    def after(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal last
        place.wait()
        run.seconds.append(time.perf_counter() - last)
        if step + 1 == stride:
            run.output = shown[-1].float().cpu()
        shown.clear()
        pipe._interrupt = step + 1 == stride * cycles  # diffusers then passes over the rest
        if watch and step + 1 == stride * (of - 1):
            profiler.start()
        last = time.perf_counter()
        return {}

    hook = pipe.transformer.register_forward_hook(lambda module, args, out: shown.append(out[0]))
    call["generator"].manual_seed(0)
    through = accelerated(pipe, "dense") if dense and row.method is None else nullcontext()
    try:
        with through, switched_on(pipe, course, 0, "inductor") as handle:
            last = time.perf_counter()
            out = pipe(**call, num_inference_steps=stride * of, callback_on_step_end=after)
            if handle is not None:
                report = handle.report()
                run.kept, run.implementations = report.kept, sorted(report.implementations)
                run.unplanned = report.unplanned
    finally:
        hook.remove()
    if not out[0].isfinite().all():
        raise RuntimeError("the latents are not finite")
    if watch:
        profiler.stop()
        run.communicating, run.computing = _shares(profiler, sum(run.seconds[-stride:]))
    if place.device.type == "cuda":
        run.peak = torch.cuda.max_memory_allocated(place.device)
    return run


def _shares(profiler: profile, seconds: float) -> tuple[float | None, float | None]:
    """Shares of `seconds` in NCCL's kernels, in which a GPU also waits for the slower one, or in
    gloo's calls, and in the GPU's other kernels. None where the profiler saw none."""
    events = profiler.events()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and e.name[:5] != "nccl:"]
    nccl = [e for e in kernels if e.name[:4] == "nccl"]
    others = [e for e in kernels if e.name[:4] != "nccl"]
    spent = (nccl or [e for e in events if "gloo:" in e.name], others)
    totals = [sum(e.time_range.elapsed_us() for e in of) / 1e6 for of in spent]
    return tuple(round(total / seconds, 4) if total else None for total in totals)


@contextmanager
def rounded_anew(transformer: nn.Module) -> Iterator[None]:
    """Every linear layer's output moves by up to half a unit in its last place, at random."""

    def move(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        half = torch.finfo(out.dtype).eps / 2
        return torch.addcmul(out, out, torch.empty_like(out).uniform_(-half, half))

    linear = [m for m in transformer.modules() if isinstance(m, nn.Linear)]
    hooks = [module.register_forward_hook(move) for module in linear]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def attempt(place: Place, *args: Any) -> Run | str:
    """A generation, or why it failed on this GPU."""
    try:
        return generate(place, *args)
    except Exception as error:  # the other processes go on, and so does this one
        traceback.print_exc(file=sys.stdout)
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
    finally:
        place.clean()


def slowest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of the process with the slowest steps, with what all of them kept."""
    kept = [facts["kept"] for facts in runs if facts["kept"] is not None]
    found = max(runs, key=lambda facts: sum(facts["seconds"].values()))
    return {**found, "kept": round(statistics.mean(kept), 4) if kept else None}
