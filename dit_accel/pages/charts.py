"""Line charts as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 200
LEFT, RIGHT, TOP, BOTTOM = 42, 4, 8, 20


class Chart(NamedTuple):
    """A drawing, and the unit of its values."""

    drawing: Markup
    unit: str


def step_chart(steps: Mapping[str, Sequence[float]]) -> Chart | None:
    """Seconds of each denoising step of each run, drawn in ms where all are short; None where a
    pipeline does not report its steps."""
    if not all(steps.values()):
        return None
    short = max(max(line) for line in steps.values()) < 1
    series = {name: [1000 * x if short else x for x in line] for name, line in steps.items()}
    unit = "ms" if short else "s"
    return Chart(lines(series, "step", unit, from_zero=True), unit)


def lines(
    series: Mapping[str, Sequence[float]], axis: str, unit: str, from_zero: bool = False
) -> Markup:
    """One SVG with a line per series (its key is the CSS class), numbered from 1.

    `axis` and `unit` name the values shown under the pointer; these words and the keys are ours,
    never a visitor's: they are not escaped.
    """
    values = [v for line in series.values() for v in line]
    marks = ticks(0.0 if from_zero else min(values), max(values))
    low, high = marks[0], marks[-1]
    count = max(len(line) for line in series.values())

    def x(index: float) -> float:
        return LEFT + (index + 0.5) * (WIDTH - LEFT - RIGHT) / count

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [_grid(y(t), f"{t:g}") for t in marks]
    parts += [_number(x(i), i + 1) for i in _labelled(count)]
    for name, line in series.items():
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(line))
        parts.append(f'<polyline class={name} points="{points}"/>')
        if count <= 40:
            dots = ((x(i), y(v)) for i, v in enumerate(line))
            parts += [f"<circle class={name} cx={a:.1f} cy={b:.1f} r=2.2 />" for a, b in dots]
    parts += [_hover(series, i, axis, unit, x(i), x(1) - x(0)) for i in range(count)]
    drawn = "".join(parts)
    said = f'role=img aria-label="{unit} of each {axis}"'
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {said}>{drawn}</svg>')


def kept_map(cells: Sequence[Sequence[float | None]], layers: Sequence[str]) -> Markup | None:
    """Kept share of attention work as one SVG: a row per layer, a column per step, the fuller the
    more was skipped; None without steps.

    cells: [step][layer], None where a layer was not called. layers: their names, of our models.
    """
    if not cells or not layers:
        return None
    size, gap = (WIDTH - LEFT - RIGHT) / len(cells), 1.5
    tall = min(max(size, 6.0), 16.0)
    parts = []
    for row, name in enumerate(layers):
        y = TOP + row * tall
        parts.append(f"<text class=end x={LEFT - 6} y={y + tall / 2 + 3.5:.1f}>{row}</text>")
        for step, line in enumerate(cells):
            kept = line[row]
            if kept is None:
                continue
            said = "all blocks" if kept >= 1 else f"{kept:.0%} of the blocks"
            place = f"x={LEFT + step * size:.1f} y={y:.1f} width={max(size - gap, 0.8):.1f}"
            parts.append(
                f"<rect class=cell {place} height={tall - gap:.1f} rx=1.5 "
                f"fill-opacity={(1 - kept) ** 0.7:.3f}><title>step {step + 1}, {escape(name)}: "
                f"{said}</title></rect>"
            )
    high = TOP + len(layers) * tall + 16
    parts += [
        f"<text class=mid x={LEFT + (i + 0.5) * size:.1f} y={high - 3:.1f}>{i + 1}</text>"
        for i in _labelled(len(cells))
    ]
    return Markup(
        f'<svg class=map viewBox="0 0 {WIDTH} {high:.0f}" role=img '
        f'aria-label="Blocks kept in each layer and step">{"".join(parts)}</svg>'
    )


def _grid(y: float, label: str) -> str:
    return (
        f"<line x1={LEFT} x2={WIDTH - RIGHT} y1={y:.1f} y2={y:.1f} />"
        f"<text class=end x={LEFT - 6} y={y + 3.5:.1f}>{label}</text>"
    )


def _number(x: float, label: int) -> str:
    return f"<text class=mid x={x:.1f} y={HEIGHT - BOTTOM + 13}>{label}</text>"


def _hover(
    series: Mapping[str, Sequence[float]], i: int, axis: str, unit: str, x: float, width: float
) -> str:
    """An invisible column that shows the values under the pointer."""
    names = {"fast": "accelerated"}
    text = ", ".join(
        f"{names.get(n, n) + ' ' if len(series) > 1 else ''}{line[i]:.4g} {unit}"
        for n, line in series.items()
        if i < len(line)
    )
    column = f"x={x - width / 2:.1f} y={TOP} width={width:.1f} height={HEIGHT - TOP - BOTTOM}"
    return f"<rect {column} ><title>{axis} {i + 1}: {text}</title></rect>"


def _labelled(count: int) -> list[int]:
    """About six evenly spaced indices, the first one included."""
    stride = next(s for s in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100, 200) if count / s <= 9)
    return list(range(0, count, stride))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose [low, high], three to six of them."""
    span = max(high - low, abs(high) * 0.02, 1e-9)
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if span / (m * power) <= 4)
    first, last = math.floor(low / step), math.ceil(high / step)
    last = max(last, first + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]
