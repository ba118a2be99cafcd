"""Scatter plots with a line per family, as stand-alone SVG for light and dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from dit_accel.pages.charts import ticks

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 52, 190, 30, 44
# Paul Tol's "bright" colours: told apart by colour-blind readers, on white and on black.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999999", "#ee8833")
_STYLE = (
    "svg{font:12px system-ui,sans-serif}text{fill:#444}line{stroke:#8884}"
    ".mark{stroke:#888;stroke-dasharray:4 4}polyline{fill:none;stroke-width:1.6}"
    "@media(prefers-color-scheme:dark){text{fill:#bbb}}"
)


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
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(value: float) -> float:
        return LEFT + value / across[-1] * width

    def y(value: float) -> float:
        return TOP + (up[-1] - value) / (up[-1] - up[0]) * height

    parts = [f"<style>{_STYLE}</style>"]
    for t in up:
        parts.append(_rule(LEFT, LEFT + width, y(t), y(t)) + _text(LEFT - 6, y(t) + 4, t, "end"))
    for t in across:
        parts.append(_text(x(t), TOP + height + 18, t, "middle"))
    parts.append(_rule(x(mark), x(mark), TOP, TOP + height, "mark"))
    parts.append(_text(x(mark), TOP - 8, "dense", "middle"))
    parts.append(_text(LEFT + width / 2, HEIGHT - 6, x_label, "middle"))
    parts.append(_text(LEFT - 40, 14, y_label, "start"))
    families = list(dict.fromkeys(p.family for p in points))
    for number, family in enumerate(families):
        colour = COLOURS[number % len(COLOURS)]
        line = sorted((p for p in points if p.family == family), key=lambda p: p.x)
        parts.append(_family(line, [(x(p.x), y(p.y)) for p in line], colour, family in loose))
        down = TOP + 12 + 18 * number
        parts.append(f'<circle cx="{WIDTH - RIGHT + 22}" cy="{down - 4}" r="4" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 32, down, family, "start"))
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n{body}\n</svg>\n'


def _family(
    line: Sequence[Point], places: Sequence[tuple[float, float]], colour: str, loose: bool
) -> str:
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dots = (
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{colour}">'
        f"<title>{escape(p.name)}: {p.x:.4g}, {p.y:.2f} dB</title></circle>"
        for p, (a, b) in zip(line, places, strict=True)
    )
    joined = "" if loose else f'<polyline points="{path}" stroke="{colour}"/>'
    return joined + "".join(dots)


def _rule(x1: float, x2: float, y1: float, y2: float, kind: str = "grid") -> str:
    ends = f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"'
    return f'<line class="{kind}" {ends}/>'


def _text(x: float, y: float, value: float | str, anchor: str) -> str:
    shown = escape(value) if isinstance(value, str) else f"{value:g}"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{shown}</text>'
