"""Where the objects of a scene stand, how large they are and how they move.

Lengths are shares of the canvas, from its upper left corner. The words say where an object stands;
only JITTER is left to chance. A size word is relative to what the number of objects leaves room
for. An object is at most 320 pixels wide on any canvas.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.inputs.scene import Scene

RANGES = {1: (0.36, 0.8), 2: (0.3, 0.52), 3: (0.25, 0.36)}  # side of an object, by their number
LARGEST_PIXELS = 320
TRAVEL = (0.16, 0.28)  # of the canvas, in 33 frames
ZOOM = (0.25, 0.4)  # logarithm of the growth in 33 frames
APART = 0.78  # distance of two objects, in sums of their half sides
JITTER = 0.06  # of a place, on each axis
PITCH = {0: 0.0, 1: 0.44, 2: 0.29}  # between neighbours, by the places on an axis less one
TRIES = 60
_STEPS = {"left of": (1, 0), "and": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
_AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
_PLACES = {"on the left": (0, -1), "on the right": (0, 1), "at the top": (1, -1),
           "at the bottom": (1, 1)}  # fmt: skip
ASIDE = 0.2  # of the centre, for an object that the words put at a side
_MOVES = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class Layout:
    """boxes: (centre x, centre y, side) of each object in the middle of the clip; velocity: of all
    objects, in canvases a frame; growth: of objects and backdrop about the centre of the canvas,
    the logarithm a frame."""

    boxes: tuple[tuple[float, float, float], ...]
    velocity: tuple[float, float] = (0.0, 0.0)
    growth: float = 0.0

    def boxes_at(self, times: Tensor) -> Tensor:
        """[O, T, 3]: every object's box so many frames after the middle of the clip, times [T]."""
        boxes = torch.tensor(self.boxes)[:, None]
        scale = torch.exp(self.growth * times)[:, None]
        moved = boxes[..., :2] + torch.tensor(self.velocity) * times[:, None]
        return torch.cat([0.5 + (moved - 0.5) * scale, boxes[..., 2:] * scale], dim=-1)


def arrange(scene: Scene, canvas: int, frames: int, rng: random.Random) -> Layout:
    """A random layout that shows what the scene says."""
    velocity, growth = _movement(scene.motion, rng)
    length = min(frames, 50)  # longer clips move a little slower
    velocity = (velocity[0] * length / frames, velocity[1] * length / frames)
    growth *= length / frames
    shrink = 1.0
    while True:
        for _ in range(TRIES):
            sides = [shrink * _side(t.size, len(scene.objects), canvas, rng) for t in scene.objects]
            boxes = [
                (_near(x, side, rng), _near(y, side, rng), side)
                for (x, y), side in zip(_places(scene), sides, strict=True)
            ]
            if _shows(scene, boxes):
                return Layout(tuple(boxes), velocity, growth)
        shrink *= 0.9


def _movement(motion: str | None, rng: random.Random) -> tuple[tuple[float, float], float]:
    kind, _, way = (motion or "still").partition(" ")
    if kind == "moving":
        speed = rng.uniform(*TRAVEL) / 32
        return (_MOVES[way][0] * speed, _MOVES[way][1] * speed), 0.0
    if kind == "zooming":
        return (0.0, 0.0), rng.uniform(*ZOOM) / 32 * (1 if way == "in" else -1)
    return (0.0, 0.0), 0.0


def _side(size: str | None, count: int, canvas: int, rng: random.Random) -> float:
    low, high = RANGES[count]
    high = min(high, LARGEST_PIXELS / canvas)
    span = {None: (0.0, 1.0), "small": (0.0, 0.25), "large": (0.75, 1.0)}[size]
    return low + (high - low) * rng.uniform(*span)


def _places(scene: Scene) -> list[tuple[float, float]]:
    """The centre of each object: a chain of neighbours, in the middle of the canvas."""
    cells = [(0.0, 0.0)]
    for relation in scene.relations:
        step = _STEPS[relation]
        cells.append((cells[-1][0] + step[0], cells[-1][1] + step[1]))
    if len(cells) == 3 and cells[0] == cells[2]:  # both on the same side of the second
        across = (0.5 * (cells[1][1] != 0), 0.5 * (cells[1][0] != 0))
        cells = [(-across[0], -across[1]), cells[1], across]
    axes = []
    for values in zip(*cells, strict=True):
        low, high = min(values), max(values)
        pitch = PITCH[round(high - low)]
        axes.append([0.5 + pitch * (v - (low + high) / 2) for v in values])
    if scene.place:
        axis, way = _PLACES[scene.place]
        axes[axis][0] += way * ASIDE
    return list(zip(*axes, strict=True))


def _near(centre: float, side: float, rng: random.Random) -> float:
    """About there, and on the canvas as far as the object fits."""
    margin = min(0.5, 0.45 * side)
    return min(max(centre + rng.uniform(-JITTER, JITTER), margin), 1 - margin)


def _shows(scene: Scene, boxes: list[tuple[float, float, float]]) -> bool:
    """No object hides another, and every word about places is true."""
    for n, first in enumerate(boxes):
        for second in boxes[:n]:
            near = APART * (first[2] + second[2]) / 2
            if max(abs(first[0] - second[0]), abs(first[1] - second[1])) < near:
                return False
    for relation, first, second in zip(scene.relations, boxes, boxes[1:], strict=False):
        if relation != "and" and not _stands(first, second, *_AXES[relation]):
            return False
    if scene.place:
        axis, way = _PLACES[scene.place]
        return way * (boxes[0][axis] - 0.5) > 0.07
    return True


def _stands(
    first: tuple[float, float, float], second: tuple[float, float, float], axis: int, way: int
) -> bool:
    along = way * (first[axis] - second[axis])
    across = abs(first[1 - axis] - second[1 - axis])
    return along >= APART * (first[2] + second[2]) / 2 and across <= 0.8 * along
