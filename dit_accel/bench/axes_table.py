"""Rows of pattern × length × ranks as text: a line each, and one Markdown table of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def line(row: dict[str, Any]) -> str:
    """A row as one line of text; the ratio is left out if the error check failed."""
    shape = row["shape"]
    where = f"{shape['name']:<14}{shape['n']:>7}  {_way(row):<12}"
    if "error" in row:
        return f"{where}{row['error']}"
    dense = row[f"{row['dense_best']}_ms"]
    return (
        f"{row['op']:<24}{row['pattern']:<9}{where}kept {row['density']:.3f}  "
        f"dense {dense:.2f} ms  ours {row['attention_ms']:.2f} ms  "
        f"{_ratio(row)}  {row['kept_tflops']:.2f} TFLOP/s  "
        f"fullest rank ×{row['balance']:.2f}  error {row['relative_error']:.1e}"
    )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table: lengths and ways down, patterns across, milliseconds and ratios."""
    timed = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["pattern"] for row in timed))
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in timed:
        shape = row["shape"]
        key = (row["op"], shape["name"], str(shape["n"]), f"{row['keep']:g}", _way(row))
        groups.setdefault(key, {})[row["pattern"]] = row
    text = [["op", "heads of", "tokens", "keep", "ranks", "dense ms", *names]]
    text.append(["---"] * len(text[0]))
    for key, found in groups.items():
        dense = {f"{row[row['dense_best'] + '_ms']:.1f}" for row in found.values()}
        cells = [_cell(found[name]) if name in found else "" for name in names]
        text.append([*key, " ".join(sorted(dense)), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def _cell(row: dict[str, Any]) -> str:
    uneven = f", ×{row['balance']:.2f}" if row["balance"] >= 1.005 else ""
    return f"{row['attention_ms']:.1f}, {_ratio(row)}{uneven}"


def _ratio(row: dict[str, Any]) -> str:
    return "check failed" if row["ratio"] is None else f"{row['ratio']:.2f}x"


def _way(row: dict[str, Any]) -> str:
    return "1" if row["ranks"] == 1 else f"{row['ranks']} {row['way']}"
