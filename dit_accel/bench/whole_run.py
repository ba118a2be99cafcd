"""Seconds of a step of each kind, and of a whole run made of them."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from dit_accel.api import Report
from dit_accel.bench.rows import Course, Row, whole_run

if TYPE_CHECKING:
    from dit_accel.runtime.report import StepCalls


def kinds_of(course: Course, count: int, report: Report | None) -> list[str]:
    """The kind of each step that ran, from what its forwards did."""
    if report is None:
        return ["skipped" if course.skips(step) else "dense" for step in range(count)]
    forwards = [[f for f in report.steps if f["step"] == step] for step in range(count)]
    calls = [sum(f["sparse"] + f["dense"] for f in found) for found in forwards]
    return [
        _kind(course, found, number < max(calls))
        for found, number in zip(forwards, calls, strict=True)
    ]


def _kind(course: Course, forwards: list[StepCalls], fewer: bool) -> str:
    if fewer and "cache" in course.row.added:
        return "skipped"
    if any(f["tokens"] < 1 for f in forwards):
        return "pruned"
    method = course.row.method
    if sum(f["dense"] for f in forwards) and not sum(f["sparse"] for f in forwards):
        return "dense"
    if method is not None and method.stateful and all(f["kept"] > 0.9999 for f in forwards):
        return "full"
    return "sparse"


def medians(kinds: list[str], seconds: list[float], scale: float) -> dict[str, object]:
    """Median seconds of each kind without its first step, in which kernels are compiled."""
    found = {kind: [s for k, s in zip(kinds, seconds, strict=True) if k == kind] for kind in kinds}
    timed = {kind: of[1:] for kind, of in found.items() if len(of) > 1}
    if not timed:
        raise RuntimeError("no step was timed: the first of each kind is thrown away")
    return {
        "seconds": {k: round(scale * statistics.median(of), 5) for k, of in timed.items()},
        "first": {kind: round(scale * of[0], 3) for kind, of in found.items()},
        "spread": {k: round(scale * (max(of) - min(of)), 5) for k, of in timed.items()},
        "timed": {kind: len(of) for kind, of in timed.items()},
        "scaled": scale,
    }


def books(course: Course, kinds: list[str], report: Report, scale: float) -> dict[str, object]:
    """What the report says of the sparse steps."""
    none = course.row.method is not None and course.row.method.name == "none"
    forwards = [f for f in report.steps if kinds[f["step"]] in ("sparse", "pruned")]
    kept = statistics.mean(f["kept"] for f in forwards) if forwards and not none else None
    share = [f["tokens"] for f in forwards if f["tokens"] < 1]
    return {
        "kept": None if kept is None else round(kept, 4),
        "tokens": round(statistics.mean(share), 4) if share else None,
        "implementations": sorted(report.implementations),
        "unplanned": report.unplanned,
        "state_gib": round(scale * report.state_bytes / 2**30, 6),
    }


def complete(rows: list[dict[str, Any]], steps: int) -> None:
    """Computes from the rows' steps what a whole run takes, and how much faster that is."""
    by_name = {(row["model"], row["row"]): row for row in rows if "seconds" in row}
    for row in by_name.values():
        recipe = Row.parse(row["row"])
        kinds = whole_run(recipe, steps)
        dense = row["seconds"].get("dense")
        for name in (recipe.stock, "stock"):
            if "dense" in kinds and dense is None and (row["model"], name) in by_name:
                dense = by_name[row["model"], name]["seconds"].get("dense")
                row["dense_from"] = name
        known = {"dense": dense, **{k: v for k, v in row["seconds"].items() if k != "dense"}}
        missing = sorted(kind for kind in set(kinds) if known.get(kind) is None)
        row["run_steps"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        row["run_absent"] = f"no {missing[0]} step was timed" if missing else row.get("unfit")
        absent = row["run_absent"] is not None
        row["run_seconds"] = None if absent else round(sum(known[k] for k in kinds), 3)
    for row in by_name.values():
        for name, base in (("speedup", "stock"), ("speedup_cudnn", "stock+cudnn")):
            other = by_name.get((row["model"], base), {}).get("run_seconds")
            mine = row["run_seconds"]
            row[name] = round(other / mine, 3) if other and mine else None
        none = by_name.get((row["model"], "none"), {}).get("seconds", {}).get("sparse")
        alone = row["row"] in ("stock", "stock+cudnn", "stock+flash")
        if alone and none and "dense" in row["seconds"]:
            row["attention_share"] = round(1 - none / row["seconds"]["dense"], 3)
