"""The backdrops that a scene may stand before, drawn: what the embedded model was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dit_accel.inputs.scene import PATTERNS, Backdrop

PERIOD = 64.0  # pixels between stripes and between dots, on every canvas
_EDGE = 6.0
Colours = Mapping[str, tuple[int, int, int]]


def draw(what: Backdrop, colours: Colours, canvas: int, side: int, scales: Tensor) -> Tensor:
    """[T, 3, side, side] in [0, 1]: a canvas of `canvas` pixels seen at `side`.

    scales: [T], how much larger its pattern is in each frame, on the device to draw on.
    """
    device = scales.device
    first = torch.tensor(colours[what.colour], device=device).float() / 255
    if what.pattern == "plain":
        return first.view(1, 3, 1, 1).expand(len(scales), 3, side, side)
    steps = (torch.arange(side, device=device) + 0.5 - side / 2) * canvas / side
    steps = steps / scales[:, None]
    y, x = steps[:, :, None], steps[:, None, :]
    if what.pattern == "ramp":
        second = torch.tensor(colours[what.second or what.colour], device=device).float() / 255
        share = (y / canvas + 0.5).clamp(0, 1).expand(-1, side, side)
    else:
        bright = float(first.mean()) > 0.65
        second = first * 0.8 if bright else first + (1 - first) * 0.3
        wave = 2 * math.pi / PERIOD
        striped = what.pattern == "striped"
        level = torch.sin((x + y) * wave) if striped else (x * wave).cos() + (y * wave).cos() - 0.8
        share = torch.sigmoid(_EDGE * level)
    share = share[:, None]
    return (1 - share) * first.view(1, 3, 1, 1) + share * second.view(1, 3, 1, 1)


def every(colours: Colours) -> list[Backdrop]:
    """All backdrops of these colours: plain, striped, dotted, and every ramp of two."""
    single = [Backdrop(p, c) for p in PATTERNS if p != "ramp" for c in colours]
    return single + [Backdrop("ramp", a, b) for a in colours for b in colours if a != b]
