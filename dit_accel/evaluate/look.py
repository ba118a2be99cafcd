"""How far each configuration's attention is from dense, per layer and step, on a model's own q, k,
v: one dense generation in which the methods run beside and are thrown away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dit_accel.api import accelerated
from dit_accel.config import AccelConfig
from dit_accel.evaluate.probe import Probe, error_of
from dit_accel.evaluate.rows import Row
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request
from dit_accel.generation.run import ProgressFn, generate
from dit_accel.machine import is_out_of_memory
from dit_accel.methods import Call
from dit_accel.schedule import Plan, Schedule

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


Errors = dict[int, dict[int, float]]


def looked_at(rows: Sequence[Row]) -> list[Row]:
    """Those whose attention can be looked at: sparse, on all tokens, by the model's own weights."""
    return [
        row
        for row in rows
        if row.config.method.name != "dense" and row.config.prune is None and not row.transformer
    ]


def errors(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    rows: Sequence[Row],
    progress: ProgressFn = lambda phase, done, total: None,
) -> dict[str, Errors]:
    """Row → layer → step → ‖O − O_dense‖ / ‖O_dense‖, where the row's schedule is sparse.

    The first guidance pass is looked at, at every step. A row that refuses a call is left out.
    """
    groups: dict[Any, list[Row]] = {}
    for row in looked_at(rows):
        config = row.config
        layout = (config.order, config.tile, config.method.block_k)
        groups.setdefault(layout, []).append(row)
    found: dict[str, Errors] = {}
    for group in groups.values():
        found |= _group(pipe, defaults, request, group, progress)
    return found


class Look:
    """What a probe shows, tried with every row of one token order and block size.

    found: row → layer → step → error, filled here; a row that refuses a call is taken out.
    """

    def __init__(self, rows: Sequence[Row], found: dict[str, Errors]) -> None:
        self.rows, self.found = list(rows), found
        self.plans: dict[str, Plan] = {}
        self.first = ""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, call: Call) -> None:
        self.first = self.first or call.passname
        if call.passname != self.first:
            return
        for row in list(self.rows):
            try:
                error = self._error(row, q, k, v, out, call)
            except (ValueError, RuntimeError) as refusal:
                if is_out_of_memory(refusal):
                    raise
                self.rows.remove(row)
                self.found[row.name].clear()
                continue
            if error is not None:
                self.found[row.name].setdefault(call.layer, {})[call.step] = error

    def _error(
        self, row: Row, q: Tensor, k: Tensor, v: Tensor, out: Tensor, call: Call
    ) -> float | None:
        method = row.config.method
        if row.name not in self.plans:
            self.plans[row.name] = Plan(
                row.config.schedule, method.keep, len(call.layers), method.runs_at_one
            )
        action = self.plans[row.name].action(call.step, call.steps, call.layer)
        if action.keep is None:
            return None
        mine = replace(call, keep=action.keep, refresh=action.refresh)
        return error_of(method, f"look {row.digest}", q, k, v, out, mine)


def _group(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    request: Request,
    rows: Sequence[Row],
    progress: ProgressFn,
) -> dict[str, Errors]:
    """Rows of one token order and block size, which see the same arranged tokens."""
    found: dict[str, Errors] = {row.name: {} for row in rows}
    config = rows[0].config
    look = Look(rows, found)
    watched = AccelConfig(
        Probe(block_q=config.method.block_q, block_k=config.method.block_k, see=look),
        Schedule(warmup=0),
        order=config.order,
        tile=config.tile,
        min_tokens=0,
    )
    with accelerated(pipe, watched):
        generate(pipe, defaults, request, progress)
    return {name: layers for name, layers in found.items() if layers}
