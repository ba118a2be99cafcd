"""CSV, row by row: a bad row is refused by its number and costs no other row."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence

from dit_accel.inputs.fields import shown

MOST_LINES = 100  # of one row, whose cells may hold line ends between quotes


Rows = Iterator[tuple[int, dict[str, str] | ValueError]]


def read_table(text: str) -> tuple[list[str], Rows]:
    """The heading, and (line number, cells by heading) of each row that holds anything.

    Errors come in the place of their row, which may have fewer cells than the heading, not more.
    Raises ValueError for a bad heading.
    """
    lines = re.split(r"\r\n|\n|\r", text)
    place = next((i for i, line in enumerate(lines) if line.strip()), 0)
    names, place = _heading(lines, place)
    return names, _rows(lines, place, names)


def _rows(lines: Sequence[str], place: int, names: Sequence[str]) -> Rows:
    while place < len(lines):
        if not lines[place].strip():
            place += 1
            continue
        cells, used = _record(lines, place, len(names))
        yield place + 1, cells if isinstance(cells, ValueError) else _by_name(names, cells)
        place += used


def _heading(lines: Sequence[str], place: int) -> tuple[list[str], int]:
    names, used = _record(lines, place, 1)
    if isinstance(names, ValueError):
        raise ValueError(f"the heading cannot be read: {names}")
    names = [name.strip() for name in names]
    if len(names) == 1 and re.search(r"[;\t]", names[0]):
        raise ValueError(f"cells are separated by commas: not as in {shown(names[0])}")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the heading names {shown(name)} twice")
    return names, place + used


def _record(lines: Sequence[str], place: int, width: int) -> tuple[list[str] | ValueError, int]:
    """The cells of the row that begins at `place`, and its lines.

    A quote that is not closed in its line must be closed in a row of just `width` cells, otherwise
    it would swallow the rows below.
    """
    for used in range(1, min(MOST_LINES, len(lines) - place) + 1):
        text = "\n".join(lines[place : place + used])
        try:
            found = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            if "unexpected end" in str(error):
                continue
            if used > 1:
                break
            return ValueError(f"this row is no CSV: {error}"), 1
        if used > 1 and len(found[0]) != width:
            break
        return found[0], used
    return ValueError("this row is no CSV: a quote is opened and not closed"), 1


def _by_name(names: Sequence[str], cells: Sequence[str]) -> dict[str, str] | ValueError:
    if len(cells) > len(names):
        more = len(cells) - len(names)
        return ValueError(f"this row has {more} cell(s) more than the heading")
    return dict(zip(names, cells, strict=False))
