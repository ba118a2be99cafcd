"""The end-to-end benchmark's rows as text: a line each, a Markdown table for each model, or CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from dit_accel.bench.models import MODELS

KINDS = ("dense", "full", "sparse", "pruned", "skipped")
COLUMNS = (
    "row",
    *(f"{kind} step s" for kind in KINDS),
    "kept",
    "run s",
    "× eager",
    "× cuDNN",
    "peak GiB",
    "note",
)


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Column → text; "" where there is nothing to say."""
    seconds = row.get("seconds", {})

    def number(name: str, digits: int) -> str:
        value = row.get(name)
        return "" if value is None else f"{value:.{digits}f}"

    steps = {f"{kind} step s": f"{seconds[kind]:.3f}" for kind in KINDS if kind in seconds}
    return {
        **dict.fromkeys(COLUMNS, ""),
        "row": row["row"],
        **steps,
        "kept": number("kept", 3),
        "run s": number("run_seconds", 1),
        "× eager": number("speedup", 2),
        "× cuDNN": number("speedup_cudnn", 2),
        "peak GiB": number("peak_gib", 1),
        "note": note(row),
    }


def note(row: dict[str, Any]) -> str:
    """What failed, what was left out, what fell back, and which kernels ran."""
    parts = [row[name] for name in ("error", "skipped", "cut", "run_absent") if row.get(name)]
    parts += [f"{count} × dense: {why}" for why, count in (row.get("unplanned") or {}).items()]
    if row.get("attention_share") is not None:
        parts.append(f"attention {row['attention_share']:.0%}")
    served = {name.partition("/")[2] for name in row.get("implementations", ())}
    return "; ".join([*parts, *sorted(served)])


def line(row: dict[str, Any]) -> str:
    """The row as one line."""
    text = [f"{row['model']:<16}{row['row']:<38}"]
    found = cells(row)
    text += [f"{name} {found[name]}" for name in COLUMNS[1:-1] if found[name]]
    return "  ".join([*text, found["note"]]).rstrip()


def markdown(record: dict[str, Any]) -> str:
    """A table for each model; columns that nothing fills are left out."""
    machine, setting = record["machine"], record["setting"]
    where = machine.get("gpu") or machine["cpu"]
    text = [
        f"{where}, torch {machine['torch']}, {setting['dtype']}, random weights; medians of "
        f"{setting['rounds']} steps, runs of {setting['steps']} steps are computed from them"
    ]
    if setting["tiny"]:
        text.append("Tiny models: these times say nothing of the real ones.")
    for name, rows in _by_model(record).items():
        found = [cells(row) for row in rows]
        columns = [c for c in COLUMNS if any(row[c] for row in found)]
        text += ["", f"**{MODELS[name].title}**", "", _line(columns), _line(["---"] * len(columns))]
        text += [_line([row[c].replace("|", "/") for c in columns]) for row in found]
    return "\n".join(text)


def csv_text(record: dict[str, object]) -> str:
    """One table of all models."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["model", *COLUMNS], lineterminator="\n")
    writer.writeheader()
    for name, rows in _by_model(record).items():
        writer.writerows({"model": name, **cells(row)} for row in rows)
    return out.getvalue().rstrip()


def _by_model(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        found.setdefault(row["model"], []).append(row)
    return found


def _line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"
