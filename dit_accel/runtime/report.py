"""What ran: kept work, dense calls with reasons, time per step, implementations, bytes of state."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from dit_accel.runtime.books import LayerBook, StepBook
from dit_accel.runtime.engine import Engine, state_bytes


class Calls(TypedDict):
    """Calls of attention, and the share of query-key block pairs that they computed."""

    sparse: int
    dense: int
    kept: float


class LayerCalls(Calls):
    """Those of a layer."""

    name: str


class StepCalls(Calls):
    """Those of a transformer forward. tokens: the share that ran the pruned span; skipped: by a
    step cache."""

    step: int
    passname: str
    seconds: float | None
    tokens: float
    skipped: bool


@dataclass(frozen=True)
class Report:
    """The books of one accelerated pipeline since `accelerate`.

    method, model: their names.
    config: of the acceleration, as JSON has it.
    kept: share of query-key block pairs computed over all attention calls (a dense call counts 1).
    layers: name, sparse calls, dense calls, kept share.
    steps: one entry per transformer forward of the last generation: step, pass, seconds, kept, and
        the share of tokens that ran the pruned span.
    fallbacks: reason → calls that ran dense, the scheduled ones included.
    unplanned: the part of them that no schedule asked for.
    implementations: operator and implementation that served → calls.
    state_bytes: kept between steps, by methods and by token pruning.
    stateless_from: the first layer whose state found no room, or None.
    generations: how many.
    notes: what of the pipeline does not run this way.
    backends: of dense attention, for each kind of call: the one that served, how many calls, and
        the milliseconds of those that were timed; empty where the pipeline's own served them all.
    """

    method: str
    config: dict[str, Any]
    model: str
    kept: float
    layers: list[LayerCalls]
    steps: list[StepCalls]
    fallbacks: dict[str, int]
    unplanned: dict[str, int]
    implementations: dict[str, int]
    state_bytes: int
    stateless_from: int | None
    generations: int
    notes: list[str] = field(default_factory=list)
    backends: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        sparse = sum(layer["sparse"] for layer in self.layers)
        dense = sum(layer["dense"] for layer in self.layers)
        lines = [
            f"{self.method} on {self.model}: {self.kept:.1%} of attention work kept"
            if sparse + dense
            else f"{self.method} on {self.model}: nothing ran",
            f"  calls: {sparse} sparse, {dense} dense, over {self.generations} generation(s)",
        ]
        lines += [f"  dense: {count} × {why}" for why, count in sorted(self.fallbacks.items())]
        served = ", ".join(f"{name} × {n}" for name, n in sorted(self.implementations.items()))
        lines += [f"  kernels: {served}"] if served else []
        lines += [f"  backend: {_chosen(found)}" for found in self.backends]
        if skipped := sum(step["skipped"] for step in self.steps):
            lines.append(f"  step cache: {skipped} of the last {len(self.steps)} forwards skipped")
        lines += [f"  state: {self.state_bytes / 2**20:.1f} MiB"] if self.state_bytes else []
        if self.stateless_from is not None:
            lines.append(f"  no room for the state of the layers from {self.stateless_from} on")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def build(engine: Engine, model: str, notes: list[str]) -> Report:
    """Read the engine's books; on CUDA this is where the device is waited for."""
    books = engine.books
    layers: list[LayerCalls] = [{"name": book.name, **_calls(book)} for book in books.layers]
    steps: list[StepCalls] = [
        {
            "step": book.step,
            "passname": book.passname,
            "seconds": book.watch.seconds,
            "tokens": book.tokens,
            "skipped": book.skipped,
            **_calls(book),
        }
        for book in books.forwards
    ]
    calls = sum(row["sparse"] + row["dense"] for row in layers)
    kept = sum(row["kept"] * (row["sparse"] + row["dense"]) for row in layers)
    return Report(
        method=engine.config.method.label,
        config=engine.config.to_dict(),
        model=model,
        kept=kept / calls if calls else 1.0,
        layers=layers,
        steps=steps,
        fallbacks=dict(books.reasons),
        unplanned={k: n for k, n in books.reasons.items() if k in books.unplanned},
        implementations=dict(books.implementations),
        state_bytes=state_bytes(engine),
        stateless_from=engine.stateless_from,
        generations=engine.clock.generation,
        notes=[*notes, *_schedule(engine)] if calls else [*notes, "no attention call came yet"],
        backends=[asdict(choice) for choice in engine.backends.choices.values()]
        if engine.backends is not None
        else [],
    )


def _schedule(engine: Engine) -> list[str]:
    """A note where the schedule left nothing to accelerate in the last run."""
    steps, schedule = engine.clock.steps, engine.config.schedule
    with suppress(ValueError):  # a number of steps that it refuses
        if steps and engine.config.method.name != "dense" and schedule.dense_steps(steps) == steps:
            return [f"the schedule makes all {steps} steps dense: lower warmup or cooldown"]
    return []


def _chosen(found: dict[str, Any]) -> str:
    """A choice of backends, in a line."""
    name = found["backend"] or "the pipeline's own"
    others = [f"{other} {ms:.3g} ms" for other, ms in found["ms"].items()]
    others += [f"{other}: {why}" for other, why in found["refused"].items()]
    return f"{name} × {found['calls']} for {found['kind']}" + (
        f" ({'; '.join(others)})" if others else ""
    )


def _calls(book: LayerBook | StepBook) -> Calls:
    calls = book.sparse + book.dense
    kept = (float(book.kept) + book.dense) / calls if calls else 1.0
    return {"sparse": book.sparse, "dense": book.dense, "kept": kept}
