"""The evaluation as a Markdown table, as JSON and as two plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dit_accel.evaluate.look import Errors
from dit_accel.evaluate.rows import PRUNING
from dit_accel.media import quality
from dit_accel.media.files import atomic
from dit_accel.pages.scatter import Point, scatter

_MEANS = (
    "attention_kept",
    "work_kept",
    "psnr",
    "ssim",
    "lpips",
    "latent_error",
    "seconds",
    "wall",
    "dense_seconds",
    "speedup",
    "state_bytes",
)
_SEEN = ("emoji", "colour", "place", "motion")  # shares of the clips that show what was asked
_SHOWN_STEPS = 8
Rows = Sequence[dict[str, Any]]


def _spread(row: dict[str, Any]) -> str:
    return f"{row['psnr']:.2f}" + (f" ± {row['psnr_sd']:.2f}" * (row["cells"] > 1))


# title, key of a row, text; a row without the key shows –, a column without any row is left out
_COLUMNS: tuple[tuple[str, str, Callable[[dict[str, Any]], str]], ...] = (
    ("attention kept", "attention_kept", lambda r: f"{r['attention_kept']:.1%}"),
    ("work kept", "work_kept", lambda r: f"{r['work_kept']:.1%}"),
    ("PSNR (dB)", "psnr", _spread),
    ("SSIM", "ssim", lambda r: f"{r['ssim']:.4f}"),
    ("LPIPS", "lpips", lambda r: f"{r['lpips']:.4f}"),
    ("latent error", "latent_error", lambda r: f"{r['latent_error']:.4f}"),
    ("attention error", "attention_error", lambda r: f"{r['attention_error']:.4f}"),
    ("flicker", "flicker", lambda r: f"{r['flicker']:.3f}"),
    ("emoji", "emoji", lambda r: f"{r['emoji']:.1%}"),
    ("colour", "colour", lambda r: f"{r['colour']:.1%}"),
    ("place", "place", lambda r: f"{r['place']:.1%}"),
    ("motion", "motion", lambda r: f"{r['motion']:.1%}"),
    ("loop (s)", "seconds", lambda r: f"{r['seconds']:.3f}"),
    ("clip (s)", "wall", lambda r: f"{r['wall']:.3f}"),
    ("speed-up", "speedup", lambda r: f"{r['speedup']:.2f}×"),
    ("cells", "cells", lambda r: str(r["cells"])),
)


def summary(cells: Rows) -> list[dict[str, object]]:
    """One entry per row: means over its cells, the spread of PSNR, flicker over dense flicker.

    A row that was refused has "error" instead of figures.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(cell["row"], []).append(cell)
    return [_row(name, group) for name, group in groups.items()]


def _row(name: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    good = [cell for cell in cells if "error" not in cell]
    head = {"row": name, "family": cells[0]["family"], "cells": len(good)}
    if not good:
        return {**head, "error": cells[0]["error"]}
    shown = [key for key in _MEANS if all(key in c for c in good)]
    out: dict[str, Any] = {key: fmean(c[key] for c in good) for key in shown}
    out["psnr_sd"] = stdev(c["psnr"] for c in good) if len(good) > 1 else 0.0
    out |= _shares(good)
    moving = [c["flicker"] for c in good if c["flicker"][0] > 0]
    out["flicker"] = fmean(mine / dense for dense, mine in moving) if moving else None
    out["unplanned"] = sorted({why for c in good for why in c["unplanned"]})
    if len({c.get("together", 1) for c in good}) > 1:
        out["mixed_calls"] = sorted({c["together"] for c in good})
    return {**head, **out}


def reference(dense: Rows) -> dict[str, object] | None:
    """The dense clips as a row: no distances, but what they show and how long they took."""
    if not dense:
        return None
    seconds, wall = (fmean(c[key] for c in dense) for key in ("seconds", "wall"))
    whole = {"attention_kept": 1.0, "work_kept": 1.0, "speedup": 1.0, "cells": len(dense)}
    return {"row": "dense", "seconds": seconds, "wall": wall, **whole, **_shares(dense)}


def _shares(cells: Rows) -> dict[str, float]:
    asked = {key: [cell[key] for cell in cells if key in cell] for key in _SEEN}
    return {key: fmean(verdicts) for key, verdicts in asked.items() if verdicts}


def markdown(rows: Rows, dense: dict[str, object] | None = None, notes: Sequence[str] = ()) -> str:
    """The table; notes, refused rows and unplanned dense calls are named below it."""
    good = [row for row in rows if "error" not in row]
    shown = [*([dense] if dense else []), *good]
    columns = [c for c in _COLUMNS if any(row.get(c[1]) is not None for row in shown)]
    lines = _table(
        ["row", *(title for title, *_ in columns)],
        [
            [
                row["row"],
                *(text(row) if row.get(key) is not None else "–" for _, key, text in columns),
            ]
            for row in shown
        ],
    )
    below = [f"- {note}" for note in notes]
    below += [f"- {row['row']}: refused: {row['error']}" for row in rows if "error" in row]
    below += [f"- {row['row']}: partly dense: {why}" for row in good for why in row["unplanned"]]
    below += [
        f"- {row['row']}: measured in calls of {' and '.join(map(str, row['mixed_calls']))} "
        "clips: the last may hold fewer, and one that ran out of memory is halved"
        for row in good
        if "mixed_calls" in row
    ]
    return "\n".join([*lines, *([""] if below else []), *below]) + "\n"


def attention_markdown(found: dict[str, Errors]) -> str:
    """Two tables: error per layer (mean over steps) and per step (mean over layers)."""
    layers = sorted({n for errors in found.values() for n in errors})
    every = sorted({s for errors in found.values() for steps in errors.values() for s in steps})
    shown = min(_SHOWN_STEPS, len(every))
    picked = sorted({every[round(i * (len(every) - 1) / max(1, shown - 1))] for i in range(shown)})
    by_layer = [
        [name, *(_mean(errors.get(n, {}).values()) for n in layers)]
        for name, errors in found.items()
    ]
    by_step = [
        [name, *(_mean(steps[s] for steps in errors.values() if s in steps) for s in picked)]
        for name, errors in found.items()
    ]
    parts = (("layer", layers, by_layer), ("step", picked, by_step))
    tables = [_table(["row", *(f"{word} {n}" for n in names)], body) for word, names, body in parts]
    return "\n".join([*tables[0], "", *tables[1]]) + "\n"


def attention_mean(errors: Errors) -> float:
    """Mean over all layers and steps that were looked at."""
    return fmean(error for steps in errors.values() for error in steps.values())


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    return f"{fmean(known):.3f}" if known else "–"


def _table(names: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [names, ["---", *("---:" for _ in names[1:])], *body]
    return [f"| {' | '.join(line)} |" for line in lines]


def write(folder: Path, data: dict[str, Any]) -> None:
    """Tables, results.json and both plots, each replaced whole; identical clips are not drawn."""
    good = [r for r in data["rows"] if "error" not in r and r["psnr"] < quality.IDENTICAL_DB]
    files = {
        "results.json": json.dumps(data, indent=1, default=str) + "\n",
        "table.md": markdown(data["rows"], data.get("dense"), data.get("notes", ())),
    }
    if data.get("attention"):
        files["attention.md"] = attention_markdown(data["attention"])
    if good:
        work = [Point(r["family"], r["row"], r["work_kept"] * 100, r["psnr"]) for r in good]
        time = [Point(r["family"], r["row"], r["seconds"], r["psnr"]) for r in good]
        dense = fmean(r["dense_seconds"] for r in good)
        near = "PSNR to dense (dB)"
        files["quality-work.svg"] = scatter(work, "work kept (% of FLOPs)", near, 100, (PRUNING,))
        files["quality-time.svg"] = scatter(time, "denoising loop (s)", near, dense, (PRUNING,))
    for name, text in files.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
