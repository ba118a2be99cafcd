"""The machine: what it is, what memory it has left, how long something took on it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import psutil
import torch

T = TypeVar("T")


def free_bytes(device: torch.device) -> int | None:
    """Bytes still to be had on `device`, PyTorch's own cache included; None when unknown."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available if device.type == "cpu" else None


def cached_tensors(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """lru_cache for functions that return tensors: these are made outside of inference mode, for
    what a validation made is trained with later."""

    def decorated(make: Callable[..., T]) -> Callable[..., T]:
        kept = lru_cache(maxsize)(torch.inference_mode(False)(make))

        @wraps(make)
        def found(*args: Any, **kwargs: Any) -> T:
            value = kept(*args, **kwargs)
            for held in _HOLDERS:
                held.append(value)
            return value

        return found

    return decorated


@contextmanager
def among(lists: list[list[T]]) -> Iterator[list[T]]:
    """A new list that is one of `lists` in this block: who writes to each of them is heard."""
    found: list[T] = []
    lists.append(found)
    try:
        yield found
    finally:
        del lists[next(i for i, x in enumerate(lists) if x is found)]


_HOLDERS: list[list[object]] = []


def holding() -> AbstractContextManager[list[object]]:
    """Collects what functions of `cached_tensors` return in a block: a CUDA graph reads it after
    the cache has let it go."""
    return among(_HOLDERS)


class Machine(TypedDict):
    """What figures depend on. gpu: its name; the last three where there is one."""

    cpu: str
    cores: int | None
    threads: int
    gpu: str | None
    system: str
    python: str
    torch: str
    diffusers: str | None
    dit_accel: str | None
    capability: NotRequired[str]
    cuda: NotRequired[str | None]
    triton: NotRequired[str | None]


class Stopwatch:
    """Seconds between `start` and `stop`: host clock, or CUDA events read only when asked for."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks = [self._mark()]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self.marks.append(self._mark())

    @property
    def seconds(self) -> float | None:
        """None when the forward did not finish."""
        return None if len(self.marks) < 2 else self.stopped()

    def stopped(self) -> float:
        """Seconds, once it has been stopped."""
        start, end = self.marks
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def describe(device: torch.device | str | None = None) -> Machine:
    """What figures taken on `device` (None: the GPU if there is one) depend on."""
    gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    found: Machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "dit_accel": _version("dit-accel"),
    }
    if gpu:
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"], found["triton"] = torch.version.cuda, _version("triton")
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host refused an allocation."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether CUDA can no longer be used by this process: only a new process helps."""
    kind = getattr(torch, "AcceleratorError", None)
    text = str(error)
    return (kind is not None and isinstance(error, kind)) or "CUDA error" in text
