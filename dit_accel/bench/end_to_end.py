"""Whole models, dense and accelerated: seconds of a step of each kind, and of a run of 50.

    python -m dit_accel.bench --e2e --model wan1.3b-480p --minutes 4 --out e2e.json

Random weights in the stock pipeline, text encoder and VAE left out. Dense time does not depend on
the weights; tables chosen by content are then those of random scores, of the same size. Each row is
written as it ends; one that fails holds its error, one that was not reached its reason.
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.bench import table
from dit_accel.bench.models import Model, TooLarge, build, inputs
from dit_accel.bench.rows import Course, Row, set_skip, switched_on
from dit_accel.bench.whole_run import books, complete, kinds_of, medians
from dit_accel.inputs.data import read_object
from dit_accel.machine import Machine, describe
from dit_accel.pipelines.denoisers import call as call_pipeline

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


SLOW = 5.0  # seconds of a stock step from which other rows take their dense steps from it
COMPILING = 45.0  # seconds that a compiled row is expected to take in addition, on a GPU
_FORM = 1


@dataclass
class Benchmark:
    """What is run, and what came of it.

    Args:
        rounds: times each kind of step is timed, after the first.
        steps: of the whole run that is computed.
        minutes: after which no row is begun, and the one at hand ends; None: no limit.
        out: a JSON file, written after each row; rows that it holds already are not run again.
        tiny: a few hundred tokens and two or three layers, to try the path.
        compiler: torch.compile's backend.
        min_tokens: attend densely below this many; None: the crossover.
        echo: takes each row as a line of text when it is ready.
    """

    device: torch.device
    rounds: int = 3
    steps: int = 50
    minutes: float | None = None
    out: Path | None = None
    tiny: bool = False
    compiler: str = "inductor"
    min_tokens: int | None = None
    echo: Callable[[str], None] = print
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    machine: Machine = field(default_factory=describe)

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            raise ValueError(f"rounds and steps are ≥ 1, not {self.rounds} and {self.steps}")
        if self.device.type != "cuda" and not self.tiny:
            raise ValueError(
                f"published sizes are timed on a CUDA device, not on {self.device}: add --tiny"
            )
        if self.out is not None and self.out.exists():
            self._read(self.out)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def left(self) -> float:
        """Seconds of the budget that are left."""
        spent = time.monotonic() - self.started
        return float("inf") if self.minutes is None else 60 * self.minutes - spent

    def run(self, models: Sequence[Model], rows: Sequence[Row]) -> None:
        """Every row of every model; each model may use its even share of the time left."""
        for number, model in enumerate(models):
            wanted = [row for row in rows if "cut" in (self.found(model.name, row.name) or {"cut"})]
            if wanted:
                until = time.monotonic() + self.left() / (len(models) - number)
                self._model(model, wanted, until)

    def found(self, model: str, row: str) -> dict[str, Any] | None:
        """The row of that name, if steps of it were timed."""
        rows = (r for r in self.rows if (r["model"], r["row"]) == (model, row))
        return next((r for r in rows if "seconds" in r), None)

    def _model(self, model: Model, rows: list[Row], until: float) -> None:
        try:
            start = time.monotonic()
            pipe = build(model, self.device, self.dtype, self.tiny)
            call = inputs(model, pipe, self.device, self.tiny)
            self.echo(f"{model.title}: built in {time.monotonic() - start:.1f} s")
        except (TooLarge, torch.OutOfMemoryError) as error:
            self._add({"model": model.name, "row": rows[0].name, "error": _text(error)})
            return
        for row in rows:
            self._row(model, pipe, call, row, until)
        del pipe, call
        _clean(self.device)

    def _row(
        self, model: Model, pipe: DiffusionPipeline, call: dict[str, object], row: Row, until: float
    ) -> None:
        known = (self.found(model.name, "stock") or {"seconds": {}})["seconds"].get("dense", 0.0)
        course = Course(row, self.rounds, dense=known < SLOW)
        result = {"model": model.name, "row": row.name}
        expected = known * model.timed / model.passes * course.steps
        if "compile" in row.added and self.compiler == "inductor":
            expected += COMPILING
        if time.monotonic() + expected > until:
            self._add({**result, "skipped": "no time left"})
            return
        try:
            result |= self._timed(model, pipe, call, course, until)
        except Exception as error:  # a row that fails says why, and the others run
            result["error"] = _text(error)
        _clean(self.device)
        self._add(result)

    def _timed(
        self,
        model: Model,
        pipe: DiffusionPipeline,
        call: dict[str, Any],
        course: Course,
        until: float,
    ) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        min_tokens = 0 if self.tiny else self.min_tokens
        with switched_on(pipe, course, min_tokens, self.compiler) as handle:
            seconds = self._steps(pipe, call, course, until)
            report = None if handle is None else handle.report()
        kinds = kinds_of(course, len(seconds), report)
        scale = model.passes / model.timed
        found: dict[str, Any] = {"started": round(time.monotonic() - self.started, 1)}
        found |= medians(kinds, seconds, scale)
        found |= {} if report is None else books(course, kinds, report, scale)
        if len(seconds) < course.steps:
            found["cut"] = f"time ran out after {len(seconds)} of {course.steps} steps"
        if cuda:
            peak, total = (
                torch.cuda.max_memory_allocated(self.device) / 2**30,
                torch.cuda.get_device_properties(self.device).total_memory / 2**30,
            )
            found["peak_gib"] = round(peak, 2)
            more = (1 - model.timed / model.passes) * found.get("state_gib", 0)
            if peak + more > total:
                found["unfit"] = f"the state of all passes would need {peak + more:.0f} GiB"
        return found

    def _steps(
        self, pipe: DiffusionPipeline, call: dict[str, Any], course: Course, until: float
    ) -> list[float]:
        """Seconds of each step of one generation; RuntimeError where its result is not finite."""
        seconds: list[float] = []
        call["generator"].manual_seed(0)
        set_skip(pipe.transformer, False)
        last = time.perf_counter()

        def after(
            pipe: DiffusionPipeline, step: int, timestep: object, tensors: dict[str, object]
        ) -> dict[str, object]:
            nonlocal last
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            now = time.perf_counter()
            seconds.append(now - last)
            set_skip(pipe.transformer, course.skips(step + 1))
            pipe._interrupt = time.monotonic() > until  # diffusers then passes over what is left
            last = time.perf_counter()
            return {}

        asked = {**call, "num_inference_steps": course.steps, "callback_on_step_end": after}
        result = call_pipeline(pipe, **asked, return_dict=False)[0]
        if not bool(result.isfinite().all()):
            raise RuntimeError("the latents are not finite")
        return seconds

    def _add(self, row: dict[str, Any]) -> None:
        """Keep the row, write all, say it."""
        same = (row["model"], row["row"])
        self.rows = [r for r in self.rows if (r["model"], r["row"]) != same] + [row]
        complete(self.rows, self.steps)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            part = self.out.with_name(self.out.name + ".part")
            part.write_text(json.dumps(self.record(), indent=1) + "\n", "utf-8")
            part.replace(self.out)
        self.echo(table.line(row))

    def record(self) -> dict[str, Any]:
        """Everything, with the machine and the command."""
        return {
            "form": _FORM,
            "machine": self.machine,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "setting": self._setting(),
            "rows": self.rows,
        }

    def _setting(self) -> dict[str, object]:
        return {
            "weights": "random",
            "dtype": str(self.dtype).removeprefix("torch."),
            "rounds": self.rounds,
            "steps": self.steps,
            "tiny": self.tiny,
            "compiler": self.compiler,
            "min_tokens": self.min_tokens,
        }

    def _read(self, path: Path) -> None:
        record = read_object(path, "record")
        same = {name: self.machine.get(name) for name in ("gpu", "torch", "triton")}
        other = {name: record.get("machine", {}).get(name) for name in same}
        before = {"compiler": "inductor", "min_tokens": None}  # of files that do not say it yet
        setting = before | record.get("setting", {}) | {"rounds": 0}
        if other != same or setting != self._setting() | {"rounds": 0}:
            raise ValueError(
                f"{path} holds rows of another machine, version or setting, which cannot be "
                "compared with new ones: give another --out"
            )
        self.rows = record["rows"]


def _text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _clean(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
