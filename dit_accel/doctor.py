"""What acceleration can give a model, found out before it runs: one layer is timed.

A transformer block of each kind runs as it is, without its attention core, and with each method.
The rest is arithmetic: Amdahl's bound, bytes of state, what a whole run would take.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.api import Handle, accelerated
from dit_accel.config import AccelConfig, named
from dit_accel.engine import Stopwatch
from dit_accel.methods import Call, infos
from dit_accel.methods.dense import Dense
from dit_accel.methods.rettention import Rettention
from dit_accel.outlook import Diagnosis, Layer, diagnose
from dit_accel.patient import Enough, Patient
from dit_accel.schedule import Schedule

REPEATS = 5


@dataclass(frozen=True)
class Hollow(Dense):
    """No attention core at all: the queries are the output. Notes shape and dtype of q."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keep", 0.5)
        object.__setattr__(self, "seen", [])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        call.note(None)
        self.seen.append((q.shape, q.dtype))
        return q


@contextmanager
def _inside(patient: Patient, config: AccelConfig) -> Iterator[tuple[Handle, dict[str, Callable]]]:
    """Within a forward of the accelerated transformer, at a step after the first: each kind of
    block as a function without arguments."""
    transformer, calls = patient.transformer, {}
    names = list(patient.kinds())

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            calls[name] = lambda: module(*args, **kwargs)
            if len(calls) == len(names):
                raise Enough

        return hook

    with accelerated(patient.pipe, config) as handle, torch.no_grad():
        hooks = [
            transformer.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
            for name in names
        ]
        try:
            transformer(*patient.args, **patient.kwargs)
        except Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        yield handle, calls


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median of REPEATS after two untimed runs."""
    times = []
    for number in range(REPEATS + 2):
        watch = Stopwatch(device)
        run()
        watch.stop()
        if number > 1:
            times.append(watch.seconds)
    return statistics.median(times)


def _timed(patient: Patient, config: AccelConfig) -> tuple[dict[str, float], Handle]:
    """Seconds of each kind of block under a configuration, whose handle has its books."""
    with _inside(patient, config) as (handle, calls):
        found = {}
        for name, run in calls.items():
            run()  # a method with a state fills it now
            handle._engine.clock.step = 1
            found[name] = _seconds(run, patient.device)
        return found, handle


def examine(
    patient: Patient,
    *,
    steps: int,
    order: str = "raster",
    progress: Callable[[str, int, int | None], None] = lambda phase, done, total: None,
) -> Diagnosis:
    """Time a block of each kind and say what it means for a run of `steps` steps.

    Raises ValueError for a model that has no adapter, with the reason.
    """
    now = Schedule(warmup=0)
    names = [name for name in infos() if name != "dense"]
    hollow = Hollow()
    progress("timing a layer", 0, len(names) + 2)
    dense, _ = _timed(patient, AccelConfig(Dense(), now, min_tokens=0))
    bare, handle = _timed(patient, AccelConfig(hollow, now, order, min_tokens=0))
    geometry, reasons = handle._engine.clock.geometry, handle.report().unplanned
    times: dict[str, dict[str, float] | str] = {}
    for number, name in enumerate(names):
        progress("timing a layer", number + 2, len(names) + 2)
        times[name] = str(next(iter(reasons))) if reasons else _one(patient, name, now, order)
    progress("timing a layer", len(names) + 2, len(names) + 2)
    layers = [
        Layer(
            type(patient.transformer.get_submodule(name)).__name__,
            count,
            *(patient.scaled(dense[name], min(bare[name], dense[name]))),
            {
                m: patient.scaled(t[name], min(bare[name], t[name]))[0]
                for m, t in times.items()
                if isinstance(t, dict)
            },
        )
        for name, count in patient.kinds().items()
    ]
    seen = hollow.seen[0] if hollow.seen else None
    return diagnose(patient, layers, times, seen, geometry, list(reasons), steps)


def _one(patient: Patient, name: str, schedule: Schedule, order: str) -> dict[str, float] | str:
    """Seconds of each kind of block with a method as it comes, or why it does not run."""
    method = named(name)
    if isinstance(method, Rettention):
        method = replace(method, period=10**6)  # its full steps are counted apart
    try:
        return _timed(patient, AccelConfig(method, schedule, order, min_tokens=0))[0]
    except (ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
