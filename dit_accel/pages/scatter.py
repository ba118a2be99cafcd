"""Scatter plots with a line per family, as stand-alone SVG for light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from dit_accel.pages.charts import ticks
from dit_accel.pages.render import render

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 52, 570, 30, 376
# Paul Tol's "bright" colours: told apart by colour-blind readers, on white and on black.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999", "#ee8833")


class Point(NamedTuple):
    family: str
    name: str
    x: float
    y: float


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    mark: float,
    loose: Sequence[str] = (),
) -> str:
    """One SVG: points of a family, unless it is `loose`, joined in the order of x; a dashed line
    at x = mark (dense)."""
    across = ticks(0.0, max(mark, *(p.x for p in points)))
    up = ticks(min(p.y for p in points), max(p.y for p in points))

    def x(value: float) -> float:
        return LEFT + value / across[-1] * (RIGHT - LEFT)

    def y(value: float) -> float:
        return TOP + (up[-1] - value) / (up[-1] - up[0]) * (BOTTOM - TOP)

    names = dict.fromkeys(p.family for p in points)
    return render(
        "pages/scatter.svg",
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=RIGHT,
        top=TOP,
        bottom=BOTTOM,
        across=[(x(value), value) for value in across],
        up=[(y(value), value) for value in up],
        mark=x(mark),
        x_label=x_label,
        y_label=y_label,
        families=[
            _family(name, points, COLOURS[number % len(COLOURS)], name not in loose, x, y)
            for number, name in enumerate(names)
        ],
    )


def _family(
    name: str,
    points: Sequence[Point],
    colour: str,
    joined: bool,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> dict[str, object]:
    line = sorted((p for p in points if p.family == name), key=lambda p: p.x)
    return {
        "name": name,
        "colour": colour,
        "path": " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in line) if joined else "",
        "dots": [
            {"x": x(p.x), "y": y(p.y), "title": f"{p.name}: {p.x:.4g}, {p.y:.2f} dB"} for p in line
        ],
    }
