"""Rows of the benchmark as JSON and as text."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from dit_accel.machine import describe

_OTHERS = (
    *("cudnn", "flash", "flash4", "flex", "flash4_sparse", "bsa", "bsa_fp8"),
    *("ours_both", "flash4_both"),
)


def store(rows: list[dict], out: str | Path) -> None:
    """Writes the rows with the machine, the versions and the command as JSON."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    record = {"machine": describe(), "command": command, "rows": rows}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def line(row: dict) -> str:
    """A row as one line of text; the ratio is left out if the error check failed."""
    shape = row["shape"]
    size = f"[{shape['batch']},{shape['heads']},{shape['n']},{shape['head_dim']}]"
    ratio = f"{row['ratio']:.2f}x" if row["ratio"] is not None else "check failed"
    name = row["dense_best"]
    best = f"dense{'' if name == 'dense' else f' ({name})'} {row[f'{name}_ms']:.2f} ms"
    others = [
        f"{name} {row[name + '_ms']:.2f}" for name in _OTHERS if row.get(f"{name}_ms") is not None
    ]
    return (
        f"{row['op']:<24}{shape['name']:<18}{size:<20}kept {row['density']:.3f}  "
        f"{best}  ours {row['ours_ms']:.2f} ms  {ratio}  "
        f"{row['kept_tflops']:.2f} TFLOP/s  error {row['relative_error']:.1e}  {' '.join(others)}"
    ).rstrip()
