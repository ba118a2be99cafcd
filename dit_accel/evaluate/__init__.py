"""The comparison: prompts × seeds × configurations against dense clips of the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_accel.evaluate.rows import Row
from dit_accel.evaluate.study import Study
from dit_accel.evaluate.tables import summary, write
from dit_accel.generate import ProgressFn

__all__ = ["Row", "Study", "evaluate", "read_prompts"]


def evaluate(
    study: Study,
    rows: Sequence[Row],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    limit: int | None = None,
    command: str = "",
    progress: ProgressFn = lambda phase, done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure every row at every prompt and seed, and write tables and plots to the study's folder.

    A cell that the folder has already is not run again, so an interrupted evaluation goes on where
    it stopped. limit: at most so many new cells now. Returns what results.json holds: rows with
    means over their cells, all cells, setting. Files: table.md, results.json, quality-work.svg,
    quality-time.svg; `note` gets a line for each new cell.
    """
    wanted = [(row, prompt, seed) for prompt in prompts for seed in seeds for row in rows]
    cells, fresh = [], 0
    for number, (row, prompt, seed) in enumerate(wanted):
        progress("evaluating", number, len(wanted))
        cell = study.known(row, prompt, seed)
        if cell is None and (limit is None or fresh < limit):
            cell = study.cell(row, prompt, seed)
            fresh += 1
            note(f"{number + 1}/{len(wanted)} {line(cell)}")
        if cell is not None:
            cells.append(cell)
    progress("evaluating", len(wanted), len(wanted))
    data = {
        "command": command,
        "setting": study.setting,
        "steps": study.steps,
        "attention_share": study.share,
        "prompts": list(prompts),
        "seeds": list(seeds),
        "missing": len(wanted) - len(cells),
        "rows": summary(cells),
        "cells": cells,
    }
    write(study.folder, data)
    return data


def line(cell: dict[str, Any]) -> str:
    """One cell in a line."""
    head = f"{cell['row']}, {cell['prompt']!r} seed {cell['seed']}: "
    if "error" in cell:
        return f"{head}refused: {cell['error']}"
    return (
        f"{head}{cell['psnr']:.1f} dB, {cell['work_kept']:.0%} of the work, "
        f"{cell['seconds']:.1f} s ({cell['speedup']:.2f}×)"
    )


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out; ValueError when there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as a list of prompts: {error}") from None
    prompts = list(dict.fromkeys(text for text in map(str.strip, lines) if text))
    if not prompts:
        raise ValueError(f"{path} holds no prompt: write one on each line")
    return prompts
