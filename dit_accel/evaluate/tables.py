"""The evaluation as a Markdown table, as JSON and as two plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dit_accel import metrics, video
from dit_accel.evaluate.plots import Point, scatter
from dit_accel.evaluate.rows import PRUNING

_MEANS = (
    "attention_kept",
    "work_kept",
    "psnr",
    "ssim",
    "latent_error",
    "seconds",
    "dense_seconds",
    "speedup",
    "state_bytes",
)
_COLUMNS = (
    ("attention kept", lambda r: f"{r['attention_kept']:.1%}"),
    ("work kept", lambda r: f"{r['work_kept']:.1%}"),
    ("PSNR (dB)", lambda r: f"{r['psnr']:.2f}" + (f" ± {r['psnr_sd']:.2f}" * (r["cells"] > 1))),
    ("SSIM", lambda r: f"{r['ssim']:.4f}"),
    ("latent error", lambda r: f"{r['latent_error']:.4f}" if "latent_error" in r else "–"),
    ("flicker", lambda r: f"{r['flicker']:.3f}" if r["flicker"] is not None else "–"),
    ("loop (s)", lambda r: f"{r['seconds']:.2f}"),
    ("speed-up", lambda r: f"{r['speedup']:.2f}×"),
    ("cells", lambda r: str(r["cells"])),
)


def summary(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
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
    out = {key: fmean(c[key] for c in good) for key in _MEANS if all(key in c for c in good)}
    out["psnr_sd"] = stdev(c["psnr"] for c in good) if len(good) > 1 else 0.0
    moving = [c["flicker"] for c in good if c["flicker"][0] > 0]
    out["flicker"] = fmean(mine / dense for dense, mine in moving) if moving else None
    out["unplanned"] = sorted({why for c in good for why in c["unplanned"]})
    return {**head, **out}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table; refused rows and unplanned dense calls are named below it."""
    names = ["row", *(name for name, _ in _COLUMNS)]
    lines = [_line(names), _line(["---", *("---:" for _ in _COLUMNS)])]
    good = [row for row in rows if "error" not in row]
    lines += [_line([row["row"], *(text(row) for _, text in _COLUMNS)]) for row in good]
    notes = [f"- {row['row']}: refused: {row['error']}" for row in rows if "error" in row]
    notes += [f"- {row['row']}: partly dense: {why}" for row in good for why in row["unplanned"]]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def write(folder: Path, data: dict[str, Any]) -> None:
    """table.md, results.json and both plots, each replaced whole; identical clips are not drawn."""
    good = [r for r in data["rows"] if "error" not in r and r["psnr"] < metrics.IDENTICAL_DB]
    files = {
        "results.json": json.dumps(data, indent=1, default=str) + "\n",
        "table.md": markdown(data["rows"]),
    }
    if good:
        work = [Point(r["family"], r["row"], r["work_kept"] * 100, r["psnr"]) for r in good]
        time = [Point(r["family"], r["row"], r["seconds"], r["psnr"]) for r in good]
        dense = fmean(r["dense_seconds"] for r in good)
        quality = "PSNR to dense (dB)"
        files["quality-work.svg"] = scatter(
            work, "work kept (% of FLOPs)", quality, 100, (PRUNING,)
        )
        files["quality-time.svg"] = scatter(time, "denoising loop (s)", quality, dense, (PRUNING,))
    for name, text in files.items():
        with video.atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
