"""The comparison: prompts × seeds × configurations against dense clips of the same seed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_accel.evaluate.clips import Pair
from dit_accel.evaluate.rows import UNTRAINED, Row
from dit_accel.evaluate.study import Study
from dit_accel.evaluate.tables import attention_mean, reference, summary, write
from dit_accel.generation.run import ProgressFn
from dit_accel.inputs import fields

WRITE_EVERY = 15.0
FILES = ("table.md", "attention.md", "results.json", "quality-work.svg", "quality-time.svg")


@dataclass
class Budget:
    """What may still be measured: at most `limit` cells, and none that would not be done within
    `minutes` of `began` (time.monotonic) if it took as long as the longest call so far."""

    limit: int | None = None
    minutes: float | None = None
    began: float = field(default_factory=time.monotonic)
    longest: float = 0.0

    def __post_init__(self) -> None:
        fields.check(self)
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit is a number of cells ≥ 0, not {self.limit}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes is the time to measure for, above 0, not {self.minutes:g}")

    def allows(self, cells: int) -> bool:
        """Whether a call for so many cells may begin."""
        if self.limit is not None and cells > self.limit:
            return False
        spent = time.monotonic() - self.began
        return self.minutes is None or spent + self.longest <= 60 * self.minutes

    def spend(self, cells: int, seconds: float) -> None:
        """A call for so many cells took so long."""
        self.longest = max(self.longest, seconds)
        if self.limit is not None:
            self.limit -= cells


def evaluate(
    study: Study,
    rows: Sequence[Row],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    budget: Budget | None = None,
    attention: bool = False,
    command: str = "",
    progress: ProgressFn = lambda phase, done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, object]:
    """Measure every row at every prompt and seed, and write tables and plots to the study's folder.

    Rows of a low rank come first, each over all prompts. What the folder has already is not
    measured again, so an interrupted evaluation goes on where it stopped. attention: also look at
    the attention output per layer and step, on the first prompt and seed. Returns what results.json
    holds: rows with means over their cells, all cells, setting. Files: table.md, attention.md,
    results.json, quality-work.svg, quality-time.svg, as it goes on; `note` gets a line for each new
    call.
    """
    budget = budget or Budget()
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    facts = {
        "command": command,
        "setting": study.setting,
        "steps": study.steps,
        "attention_share": study.share,
        "prompts": list(prompts),
        "seeds": list(seeds),
        "attention": study.attention(rows, *pairs[0], progress) if attention else {},
    }
    _measure(study, rows, pairs, facts, budget, progress, note)
    return _publish(study, rows, pairs, facts)


def _measure(
    study: Study,
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    facts: dict[str, object],
    budget: Budget,
    progress: ProgressFn,
    note: Callable[[str], None],
) -> None:
    """All cells that the budget allows, call by call."""
    size = study.batch
    calls = [pairs[at : at + size] for at in range(0, len(pairs), size)]
    total, done, written = len(rows) * len(pairs), 0, time.monotonic()
    for row in sorted(rows, key=lambda row: row.rank):
        for call in calls:
            progress("evaluating", done, total)
            done += len(call)
            if all(study.known(row, *pair) for pair in call):
                continue
            if not budget.allows(len(call)):
                return
            began = time.monotonic()
            found = study.cells(row, call)
            budget.spend(len(call), time.monotonic() - began)
            note(f"{done}/{total} {line(found)}")
            if "error" in found[0]:
                break
            if time.monotonic() - written > WRITE_EVERY:
                _publish(study, rows, pairs, facts)
                written = time.monotonic()
    progress("evaluating", total, total)


def _publish(
    study: Study, rows: Sequence[Row], pairs: Sequence[Pair], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write what is known by now, and give it back."""
    cells, missing = [], 0
    for row in rows:
        lines = [study.journal.lines.get(study.key(row, *pair)) for pair in pairs]
        named = {"row": row.name, "family": row.family}
        cells += [{**found, **named} for found in lines if found is not None]
        refused = any(found is not None and "error" in found for found in lines)
        missing += 0 if refused else lines.count(None)
    table = summary(cells)
    for entry in table:
        if entry["row"] in facts["attention"]:
            entry["attention_error"] = attention_mean(facts["attention"][entry["row"]])
    dense = [found for pair in pairs if (found := study.dense.known(*pair)) is not None]
    data = {
        **facts,
        "missing": missing,
        "notes": _notes(study, rows, bool(facts["attention"])),
        "dense": reference(dense),
        "rows": table,
        "cells": cells,
    }
    write(study.folder, data)
    return data


def _notes(study: Study, rows: Sequence[Row], looked: bool) -> list[str]:
    """What the figures of this run mean, and which are not there."""
    calls = f"in calls of {study.batch} clips, " if study.batch > 1 else ""
    found = [f"times are those of one clip, {calls}on {_machine(study)}"]
    if any(row.family == UNTRAINED for row in rows):
        found.append(f"{UNTRAINED} is topk: without learned weights the two are the same function")
    if not any(row.family == "sla" for row in rows):
        found.append("sla tuned: not measured, no learned weights were given (--sla-weights)")
    if isinstance(study.lpips, str):
        found.append(f"LPIPS: not measured, {study.lpips}")
    if isinstance(study.recogniser, str):
        found.append(f"emoji and colour: not measured, {study.recogniser}")
    if looked:
        found.append(
            "attention error: ‖O − O_dense‖ / ‖O_dense‖, mean over layers and sparse steps of one "
            "prompt; each layer and step is in attention.md and results.json"
        )
    return found


def _machine(study: Study) -> str:
    machine = study.setting["machine"]
    return f"{machine['gpu'] or machine['cpu']}, {study.setting['dtype']}"


def line(cells: Sequence[dict[str, Any]]) -> str:
    """The cells of one call in a line."""
    first, more = cells[0], len(cells) - 1
    head = f"{first['row']}, {first['prompt']!r} seed {first['seed']}"
    head += f" and {more} more: " if more else ": "
    if "error" in first:
        return f"{head}refused: {first['error']}"
    mean = {k: sum(c[k] for c in cells) / len(cells) for k in ("psnr", "work_kept", "speedup")}
    return (
        f"{head}{mean['psnr']:.1f} dB, {mean['work_kept']:.0%} of the work, "
        f"{first['seconds']:.2f} s a clip ({mean['speedup']:.2f}×)"
    )
