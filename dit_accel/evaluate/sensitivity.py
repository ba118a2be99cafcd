"""How much each layer minds sparse attention, measured on a model's own activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

from torch import Tensor

from dit_accel.api import accelerated
from dit_accel.config import AccelConfig
from dit_accel.evaluate.probe import Probe, error_of
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.generation.run import ProgressFn, generate
from dit_accel.methods import Call
from dit_accel.schedule import Plan, Schedule

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


EVERY = 4  # steps between two looks; a method with a state is followed at every step


@dataclass(frozen=True)
class Sensitivity:
    """errors[layer][keep]: mean ‖O − O_dense‖ / ‖O_dense‖ of that layer's attention output."""

    errors: dict[int, dict[float, float]]

    def limits(self) -> list[float]:
        """Every error that occurs, rising: each gives another choice of `schedule`."""
        return sorted({0.0, *(e for ladder in self.errors.values() for e in ladder.values())})

    def schedule(self, base: Schedule, limit: float) -> Schedule:
        """`base` with the smallest measured keep whose error is within `limit` for each layer,
        and the layers that have none dense."""
        within = {
            layer: [keep for keep, error in ladder.items() if error <= limit]
            for layer, ladder in self.errors.items()
        }
        dense = tuple(layer for layer, keeps in within.items() if not keeps)
        sparse = tuple((layer, min(keeps)) for layer, keeps in within.items() if keeps)
        return replace(base, dense_layers=dense, layer_keep=sparse)

    def planned(self, base: Schedule, limit: float, keep: float, steps: int) -> float:
        """Mean planned keep over steps and layers at `limit`; keep: the method's."""
        plan = Plan(self.schedule(base, limit), keep, max(self.errors) + 1)
        actions = [plan.action(step, steps, n) for step in range(steps) for n in self.errors]
        return fmean(_mean(action.keep) for action in actions)

    def to_dict(self) -> dict[str, dict[str, float]]:
        return {str(n): {str(k): e for k, e in row.items()} for n, row in self.errors.items()}

    @classmethod
    def from_dict(cls, data: dict[str, dict[str, float]]) -> Sensitivity:
        return cls({int(n): {float(k): e for k, e in row.items()} for n, row in data.items()})


def _mean(keep: float | tuple[float, ...] | None) -> float:
    """Of an action: all, where it is dense."""
    if keep is None:
        return 1.0
    return fmean(keep) if isinstance(keep, tuple) else min(1.0, keep)


def measure(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    config: AccelConfig,
    keeps: Sequence[float],
    progress: ProgressFn = lambda phase, done, total: None,
) -> Sensitivity:
    """One dense generation in which `config.method` also runs at each keep, and is thrown away.

    Looks at the steps that `config.schedule` leaves sparse, in the first guidance pass. Raises
    ValueError when no call could be looked at.
    """
    books: dict[int, dict[float, list[float]]] = {}
    first: list[str] = []
    looked: list[int] = []

    def see(q: Tensor, k: Tensor, v: Tensor, out: Tensor, call: Call) -> None:
        first[:] = first or [call.passname]
        if config.schedule.dense_at(call.step, call.steps) or call.passname != first[0]:
            return
        if not looked or call.step - looked[-1] >= (1 if config.method.stateful else EVERY):
            looked.append(call.step)
        if call.step != looked[-1]:
            return
        ladder = books.setdefault(call.layer, {keep: [] for keep in keeps})
        for keep in keeps:
            tried = replace(call, keep=keep, refresh=False)
            method = config.method.replaced(keep=keep)
            ladder[keep].append(error_of(method, f"try {keep}", q, k, v, out, tried))

    watched = replace(
        config, method=Probe(see=see), schedule=Schedule(warmup=0), prune=None, min_tokens=0
    )
    with accelerated(pipe, watched):
        generate(pipe, defaults, request, progress)
    errors = {n: {k: fmean(e) for k, e in row.items()} for n, row in sorted(books.items())}
    if not errors:
        raise ValueError(
            "no attention call could be measured: the schedule leaves no step sparse, "
            "or the model's attention must stay dense (see dit-accel doctor)"
        )
    return Sensitivity(errors)
