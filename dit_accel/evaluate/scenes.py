"""Is the scene that was asked for what is seen? Emoji, colours, places and motion of a clip.

Objects are sought in the middle frame of a clip, and then in its first and last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.evaluate import backdrop
from dit_accel.evaluate.recognition import Recogniser, small
from dit_accel.evaluate.sighting import SIDE, SIZES, Frame, Sighting
from dit_accel.generation.loading import EMBEDDED
from dit_accel.inputs.scene import Backdrop, Scene, UnknownWords, Vocabulary

EXPLAINED = 0.35  # least share of a difference that makes a sighting an object
EXTRA = 0.3  # of the least object's explained error: what explains more is one too many
MOVED, GREW = 0.07, 0.12  # canvases, logarithm: less is standing still
_GROWTHS = tuple(1.1**n for n in range(-3, 4))
_ZOOMS = (-0.16, 0.0, 0.16)  # logarithm of a pattern's growth from the middle to an end
_AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1),
         "on the left": (0, -1), "on the right": (0, 1), "at the top": (1, -1),
         "at the bottom": (1, 1)}  # fmt: skip


@dataclass(frozen=True)
class SceneRecogniser(Recogniser):
    """For a model whose `training.json` tells of scenes."""

    def judge(self, prompts: Sequence[str], clips: Sequence[Tensor]) -> list[dict[str, bool]]:
        """For each uint8 clip [T, H, W, 3] whether what its prompt asks for is seen.

        emoji: every one, and none twice in its stead; alone: nothing else nearly as clear;
        colour: all colours and the pattern of the backdrop; place: every word about places, where
        there is one; motion: as asked, or none. {} where the prompt asks for no scene.
        """
        threads = torch.get_num_threads()
        # the steps of one clip are too small to be shared: a clip for each thread
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            found = list(pool.map(self._one, prompts, clips))
        torch.set_num_threads(threads)  # of threads that are still to come
        return found

    def _one(self, prompt: str, clip: Tensor) -> dict[str, bool]:
        vocabulary = Vocabulary(tuple(self.references.names), tuple(self.references.colours))
        try:
            scene = vocabulary.read(prompt)
        except UnknownWords:
            return {}
        canvas, middle = clip.shape[1], (len(clip) - 1) // 2
        seen = small(clip[[0, middle, len(clip) - 1]], SIDE).to(self.references.rgba.device) / 255
        ground = self._backdrop(seen[1], canvas)
        frame = Frame(seen[1], self._drawn(scene.backdrop, canvas))
        templates, count = self.references.at(middle), len(scene.objects)
        found = frame.find(templates, SIZES, count + 1)
        *found, extra = found
        found = [f for f in found if f.share > EXPLAINED]
        names = [self.references.names[f.index] for f in found]
        out = {"emoji": sorted(names) == sorted(thing.name for thing in scene.objects)}
        out["alone"] = bool(found) and extra.gain < EXTRA * min(f.gain for f in found)
        out["colour"] = ground == scene.backdrop
        boxes = dict(zip(names, found, strict=True))
        if scene.place or set(scene.relations) - {"and"}:
            out["place"] = out["emoji"] and _placed(scene, boxes)
        if len(clip) > 1:
            out["motion"] = bool(found) and self._motion(scene, found, seen, len(clip), canvas) == (
                scene.motion
            )
        return out

    def _drawn(self, what: Backdrop, canvas: int, growth: float = 0.0) -> Tensor:
        scales = torch.tensor([growth], device=self.references.rgba.device).exp()
        return backdrop.draw(what, self.references.colours, canvas, SIDE, scales)[0]

    def _backdrop(self, seen: Tensor, canvas: int) -> Backdrop:
        """The backdrop nearest to a frame; what objects hide counts little."""
        every = backdrop.every(self.references.colours)
        drawn = torch.stack([self._drawn(what, canvas) for what in every])
        errors = (drawn - seen).abs().sum(1).clamp(max=0.5).mean((1, 2))
        return every[int(errors.argmin())]

    def _motion(
        self, scene: Scene, found: list[Sighting], seen: Tensor, frames: int, canvas: int
    ) -> str | None:
        """How the objects got from the first frame to the last: a motion's words, or None."""
        ends = []
        for picture, at in ((seen[0], 0), (seen[2], frames - 1)):
            grounds = [self._drawn(scene.backdrop, canvas, zoom) for zoom in _ZOOMS]
            ground = min(grounds, key=lambda g: float((g - picture).abs().clamp(max=0.3).mean()))
            templates = self.references.at(at)
            frame = Frame(picture, ground)
            ends.append([
                frame.find(templates[f.index][None], [f.size * g for g in _GROWTHS], 1)[0]
                for f in found
            ])  # fmt: skip
        return _direction(*ends)


def recogniser(model: str | Path | None, device: torch.device | str = "cpu") -> Recogniser | str:
    """For the embedded model, scenes or not; for another the sentence why there is none."""
    found = Recogniser.of(model, device)
    if isinstance(found, str) or Vocabulary.load(EMBEDDED) is None:
        return found
    return SceneRecogniser(found.references, 1)


def _placed(scene: Scene, boxes: dict[str, Sighting]) -> bool:
    """True when every word about places holds."""
    things = [boxes[thing.name] for thing in scene.objects]
    if scene.place:
        axis, way = _AXES[scene.place]
        return way * ((things[0].x, things[0].y)[axis] - 0.5) > 0
    for relation, first, second in zip(scene.relations, things, things[1:], strict=False):
        if relation != "and":
            axis, way = _AXES[relation]
            gap = (first.x - second.x, first.y - second.y)
            if way * gap[axis] <= 0 or abs(gap[axis]) < abs(gap[1 - axis]):
                return False
    return True


def _direction(first: list[Sighting], last: list[Sighting]) -> str | None:
    count = len(first)
    x = sum(b.x - a.x for a, b in zip(first, last, strict=True)) / count
    y = sum(b.y - a.y for a, b in zip(first, last, strict=True)) / count
    sizes = torch.tensor([[a.size, b.size] for a, b in zip(first, last, strict=True)])
    growth = float((sizes[:, 1] / sizes[:, 0]).log().mean())
    if abs(growth) > GREW:
        return "zooming in" if growth > 0 else "zooming out"
    if max(abs(x), abs(y)) < MOVED:
        return None
    if abs(x) > abs(y):
        return "moving right" if x > 0 else "moving left"
    return "moving down" if y > 0 else "moving up"
