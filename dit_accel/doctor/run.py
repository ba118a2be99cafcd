"""What acceleration can give a model, found out before it runs: one layer is timed.

A transformer block of each kind runs as it is, without its attention core, and with each method.
The rest is arithmetic: Amdahl's bound, bytes of state, what a whole run would take.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dit_accel.api import Handle, accelerated
from dit_accel.config import AccelConfig, named
from dit_accel.doctor.diagnosis import USUAL, BlockTimes, Diagnosis, diagnose
from dit_accel.doctor.sample import Enough, Sample
from dit_accel.machine import Stopwatch
from dit_accel.methods import Call, Method, infos
from dit_accel.methods.dense import Dense
from dit_accel.methods.stateful import Remembering
from dit_accel.schedule import Schedule

ROUNDS = 5
BUDGET = 15.0  # seconds: no round is begun after them
LONG = 0.5  # seconds: a processor runs such a block once in a round


class Hollow(Dense):
    """No attention core at all: the queries are the output. Notes shape and dtype of q."""

    seen: list[tuple[torch.Size, torch.dtype]]  # no field: it configures nothing
    always: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "seen", [])

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        call.note(None)
        self.seen.append((q.shape, q.dtype))
        return q


@contextmanager
def _inside(sample: Sample, config: AccelConfig) -> Iterator[tuple[Handle, dict[str, Callable]]]:
    """Within a forward of the accelerated transformer, at a step after the first: each kind of
    block as a function without arguments."""
    transformer, calls = sample.transformer, {}
    names = list(sample.kinds())

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            calls[name] = lambda: module(*args, **kwargs)
            if len(calls) == len(names):
                raise Enough

        return hook

    with accelerated(sample.pipe, config) as handle, torch.no_grad():
        hooks = [
            transformer.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True)
            for name in names
        ]
        try:
            transformer(*sample.args, **sample.kwargs)
        except Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        yield handle, calls


def _run(sample: Sample, config: AccelConfig) -> tuple[dict[str, float], Handle]:
    """Seconds of each kind of block under a configuration, whose handle has its books."""
    with _inside(sample, config) as (handle, calls):
        found = {}
        for name, run in calls.items():
            found[name] = _seconds(run, sample.device)
            handle.clock.step = 1
            # a method with a state has filled it now, a GPU has compiled its kernels
            slow = found[name] > LONG and sample.device.type == "cpu"
            if config.method.stateful or not slow:
                found[name] = _seconds(run, sample.device)
        return found, handle


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    watch = Stopwatch(device)
    run()
    watch.stop()
    return watch.stopped()


def examine(
    sample: Sample,
    *,
    steps: int,
    schedule: Schedule = USUAL,
    order: str = "raster",
    progress: Callable[[str, int, int | None], None] = lambda phase, done, total: None,
) -> Diagnosis:
    """Time a block of each kind and say what it means for a run of `steps` steps under a
    schedule.

    Each kind of run has its turn in each round, and its fastest turn counts, so that a busy machine
    disturbs little. Raises ValueError for a model that has no adapter, with the reason.
    """
    hollow, began = Hollow(), time.perf_counter()
    configs = _configs(hollow, order)
    best: dict[str, dict[str, float]] = {}
    refused: dict[str, str] = {}
    for turn in range(ROUNDS):
        if turn and time.perf_counter() - began > BUDGET:
            break
        for number, (name, config) in enumerate(configs.items()):
            progress("timing a layer", turn * len(configs) + number, ROUNDS * len(configs))
            try:
                found, handle = _run(sample, config)
            except (ValueError, RuntimeError) as error:
                if isinstance(config.method, Dense):
                    raise
                refused[name] = str(error).splitlines()[0]
                continue
            best[name] = _faster(best.get(name, found), found)
            if name == "":
                geometry, reasons = handle.clock.geometry, handle.report().unplanned
    progress("timing a layer", 1, 1)
    if reasons and not hollow.seen:
        refused = dict.fromkeys(configs.keys() - {"", "dense"}, next(iter(reasons)))
    dense, bare = best.pop("dense"), best.pop("")
    layers = [
        BlockTimes(
            type(sample.transformer.get_submodule(name)).__name__,
            count,
            *sample.scaled(dense[name], bare[name]),
            {
                method: sample.scaled(seconds[name], bare[name])[0]
                for method, seconds in best.items()
                if method not in refused
            },
        )
        for name, count in sample.kinds().items()
    ]
    seen = hollow.seen[0] if hollow.seen else None
    times = {name: refused.get(name) or best[name] for name in configs if name not in ("", "dense")}
    return diagnose(sample, layers, times, seen, geometry, list(reasons), steps, schedule)


def _configs(hollow: Hollow, order: str) -> dict[str, AccelConfig]:
    """Each method as it comes, sparse from the first step on; "" has no attention core. One that
    keeps a number of tiles, not a share, belongs to the model that was trained with it."""
    now = Schedule(warmup=0)
    found = {name: named(name) for name in infos()}
    shares = {n: m for n, m in found.items() if m.keep < 1 or isinstance(m, Dense)}
    methods: dict[str, Method] = {"": hollow, **shares}
    for name, method in methods.items():
        if isinstance(method, Remembering):  # its full steps are counted apart
            methods[name] = replace(method, period=10**6)
    return {name: AccelConfig(m, now, order, min_tokens=0) for name, m in methods.items()}


def _faster(known: dict[str, float], found: dict[str, float]) -> dict[str, float]:
    """Of each kind of block the smaller time."""
    return {name: min(seconds, known[name]) for name, seconds in found.items()}
