"""Objects found in one frame before a known backdrop: each template at every place and size.

An object p with cover α before a backdrop b is seen as p + (1 - α)·b. With d = x - b and
u = p - α·b the squared error that the object explains is Σ (2·d·u - u²), four correlations.
The best is taken out of the frame and the next one is sought (matching pursuit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

SIDE = 40  # pixels of a frame that is looked at
SIZES = tuple(0.22 * 1.16**n for n in range(10))  # of an object, in canvases
OUTSIDE = 0.3  # share of an object that may lie outside of the canvas


@dataclass(frozen=True)
class Sighting:
    """index: of the template; x, y: centre and size, in canvases; share: of the squared difference
    to the backdrop at the object's place that the object explains; gain: the explained sum."""

    index: int
    x: float
    y: float
    size: float
    share: float
    gain: float


@dataclass
class Frame:
    """seen and backdrop: [3, SIDE, SIDE] in [0, 1]; objects that are found join the backdrop."""

    seen: Tensor
    backdrop: Tensor

    def find(self, templates: Tensor, sizes: Sequence[float], count: int) -> list[Sighting]:
        """The `count` objects that explain most, the best first.

        templates: [N, 4, h, w] in [0, 1], colours multiplied by alpha.
        """
        found = []
        for _ in range(count):
            best = max((self._best(templates, size) for size in sizes), key=lambda b: b[0])
            gain, index, size, row, column = best
            found.append(self._take(templates[index], gain, index, size, row, column))
        return found

    def _best(self, templates: Tensor, size: float) -> tuple[float, int, float, int, int]:
        """Explained error, template, size and upper left corner of the best of one size."""
        side, edge = _pixels(size)
        small = _resize(templates, side)
        colour, alpha = small[:, :3], small[:, 3:]
        inside = functional.pad(torch.ones_like(self.seen[:1]), [edge] * 4)
        d, b = (functional.pad(x, [edge] * 4) for x in (self.seen - self.backdrop, self.backdrop))
        planes = torch.cat(
            [2 * d, -2 * (d * b).sum(0, True), 2 * b, -(b * b).sum(0, True), -inside]
        )
        square = (colour * colour).sum(1, True)
        kernels = torch.cat([colour, alpha, alpha * colour, alpha * alpha, square], 1)
        gain = functional.conv2d(planes[None], kernels)[0]
        place = int(gain.argmax())
        width = gain.shape[2]
        index, place = divmod(place, gain.shape[1] * width)
        row, column = divmod(place, width)
        return float(gain[index, row, column]), index, size, row - edge, column - edge

    def _take(
        self, template: Tensor, gain: float, index: int, size: float, row: int, column: int
    ) -> Sighting:
        """Put the object into the backdrop; what it explains, where it is opaque."""
        side, _ = _pixels(size)
        small = _resize(template[None], side)[0]
        rows = slice(max(0, row), min(SIDE, row + side))
        columns = slice(max(0, column), min(SIDE, column + side))
        part = small[:, rows.start - row : rows.stop - row]
        part = part[..., columns.start - column : columns.stop - column]
        old, seen = self.backdrop[:, rows, columns], self.seen[:, rows, columns]
        new = part[:3] + (1 - part[3:]) * old
        before = ((seen - old).square() * part[3:]).sum()
        after = ((seen - new).square() * part[3:]).sum()
        self.backdrop = self.backdrop.clone()
        self.backdrop[:, rows, columns] = new
        share = float(1 - after / before.clamp(min=1e-6))
        x, y = (column + side / 2) / SIDE, (row + side / 2) / SIDE
        return Sighting(index, x, y, side / SIDE, share, gain)


def _pixels(size: float) -> tuple[int, int]:
    side = max(2, round(size * SIDE))
    return side, round(OUTSIDE * side)


def _resize(templates: Tensor, side: int) -> Tensor:
    return functional.interpolate(templates, (side, side), mode="bilinear", antialias=True)
