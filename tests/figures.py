"""Figures of pages beside those of raw files, for the tests that hold them together."""

import json
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RAW = ROOT / "benchmarks" / "results"


@cache
def raw(name: str) -> dict:
    return json.loads((RAW / f"{name}.json").read_text())


def tables(page: str) -> list[list[list[str]]]:
    """Every table of a page as rows of cells, without bold type and code marks."""
    found, rows = [], []
    for line in [*(ROOT / page).read_text().split("\n"), ""]:
        if line.startswith("|"):
            rows.append([re.sub(r"[*`]", "", cell).strip() for cell in line[1:-1].split("|")])
        elif rows:
            found, rows = [*found, rows], []
    return found


def table(page: str, first: str) -> list[list[str]]:
    """The table whose heading begins with `first`, without the line of dashes."""
    (found,) = [rows for rows in tables(page) if rows[0][0].startswith(first)]
    return [found[0], *found[2:]]


def same(shown: str, measured: str) -> bool:
    """Is what is shown the measured figure, rounded to the digits that are shown?"""
    digits = len(shown.partition(".")[2])
    return abs(float(shown) - float(measured)) <= 0.5 * 10**-digits + 1e-6
