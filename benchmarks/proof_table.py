"""The journals of several `dit-accel evaluate` folders as one table, one plot and one JSON file.

    python benchmarks/proof_table.py out/p9/* --out h200-evaluate.json
    python benchmarks/proof_table.py --tables h200-evaluate-a.json … --plot frontier.svg

Each folder holds some of the prompts, or some of the rows, of one setting. Of every clip the JSON
keeps the PSNR and what was recognised, of every row the means over all its clips. Rows that were
not measured on as many prompts as the most are left out, unless --least says how many suffice.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from dit_accel.evaluate.tables import markdown, reference, summary
from dit_accel.pages.scatter import Point, scatter

FAMILIES = (
    (r"dense, \d+ of \d+ steps", "fewer steps"),
    (r"dense\+cache@0\.(05|1|15|2)", "step cache"),  # at 0.3 it is an older one
    (r"shared-q64-tile-steps-\d+ \+ cache@.*", "shared + step cache"),
    (r"shared-sort-heads-\d+", "shared, own orders"),
    (r"pooled-sort-heads-steps-\d+", "pooled, own orders"),
    (r"shared \d+%", "shared, as it comes"),
    (r"rettention \d+%", "rettention"),
    (r"sla \d+%, sla\d+.*", "SLA, fine-tuned"),
)  # a row's name → its line of the plot


def read(folders: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(setting, cells, dense clips), each clip of a row once; ValueError for unlike settings."""
    setting: dict[str, Any] = {}
    cells: dict[tuple[str, str, int], dict[str, Any]] = {}
    dense: dict[str, dict[str, Any]] = {}
    for folder in folders:
        head, *lines = map(json.loads, (folder / "cells.jsonl").read_text().splitlines())
        alike = {k: v for k, v in head["setting"].items() if k != "machine"}
        if setting and {k: v for k, v in setting.items() if k != "machine"} != alike:
            raise ValueError(f"{folder} was measured in another setting than {folders[0]}")
        setting = head["setting"]
        for line in lines:
            if "row" in line and "error" not in line:
                line["row"] = line["family"] = short(line["row"])
                cells[line["row"], line["prompt"], line["seed"]] = line
            elif line["key"].startswith("dense #"):
                dense[line["key"]] = line
    return setting, list(cells.values()), list(dense.values())


def short(name: str) -> str:
    """A preset file by its stem."""
    return re.sub(r"\S*/([^/\s]+)\.json", r"\1", name)


def family(name: str) -> str | None:
    """The line of the plot that a row belongs to."""
    for pattern, line in FAMILIES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, line, name)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path, nargs="+", help="what --out wrote, for the plot")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--command", default="", help="that made the folders, for the record")
    parser.add_argument("--least", type=int, help="clips of a row; default: as many as the most")
    args = parser.parse_args()
    if args.folders and args.out:
        tabulate(args)
    elif not (args.tables and args.plot):
        parser.error("give folders and --out, or --tables and --plot")
    if args.plot:
        tables = args.tables or [args.out]
        args.plot.write_text(plot([json.loads(path.read_text()) for path in tables]))


def tabulate(args: argparse.Namespace) -> None:
    """Write --out and print the table."""
    setting, cells, dense = read(args.folders)
    table = summary(cells)
    least = args.least or max(row["cells"] for row in table)
    table = [row for row in table if row["cells"] >= least]
    for row in table:  # times of clips that were made beside others say nothing
        for name in ("seconds", "wall", "dense_seconds", "speedup"):
            row.pop(name, None)
        row["family"] = family(row["row"])
    table.sort(key=lambda row: -row["psnr"])
    clips = {
        row["row"]: [[c["prompt"], c["seed"], round(c["psnr"], 2)]
                     for c in cells if c["row"] == row["row"]]
        for row in table
    }  # fmt: skip
    whole = reference(dense) or {}
    record = {"command": args.command, "setting": setting, "dense": whole, "rows": table}
    args.out.write_text(json.dumps({**record, "psnr": clips}, indent=None) + "\n")
    print(markdown([{**row, "seconds": None} for row in table], whole))


def plot(records: list[dict[str, Any]]) -> str:
    """The families' lines over the work kept; of a row in several files, the first."""
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        for row in record["rows"]:
            rows.setdefault(row["row"], row)
    points = [
        Point(line, row["row"], row["work_kept"] * 100, row["psnr"])
        for row in sorted(rows.values(), key=lambda row: row["work_kept"])
        if (line := family(row["row"]))
    ]
    return scatter(points, "work kept (% of FLOPs)", "PSNR to dense (dB)", 100)


if __name__ == "__main__":
    main()
