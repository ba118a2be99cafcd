"""Scenes as pixels, on the device that holds the clips: objects on a backdrop, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from clips import Clips
from layout import Layout
from torch import Tensor
from torch.nn import functional

from dit_accel.evaluate import backdrop
from dit_accel.inputs.scene import Scene


@dataclass(frozen=True)
class Composer:
    """Draws scenes of the emoji in `clips`, whose halves are kept for small objects."""

    clips: Clips
    halves: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n, t, side = self.clips.rgba.shape[:3]
        halves = torch.empty(
            n, t, side // 2, side // 2, 4, dtype=torch.uint8, device=self.clips.rgba.device
        )
        for small, rgba in zip(halves, self.clips.rgba, strict=True):
            blocks = rgba.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).float()
            small.copy_(blocks.mean((2, 4)).round())
        object.__setattr__(self, "halves", halves)

    def draw(
        self, scene: Scene, layout: Layout, side: int, frames: int, start: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Video [3, T, side, side] in [-1, 1] and how much of it objects cover, [T, side, side].

        start: time of the first frame, from the middle of the clip; default: these are all frames.
        """
        device = self.clips.rgba.device
        start = -(frames - 1) / 2 if start is None else start
        times = torch.arange(frames, device=device) + start
        scales = torch.exp(layout.growth * times)
        canvas = backdrop.draw(scene.backdrop, self.clips.colours, side, side, scales)
        covered = torch.zeros(frames, side, side, device=device)
        for number, thing in enumerate(scene.objects):
            boxes = torch.tensor([layout.at(number, t + start) for t in range(frames)])
            sprite = self._sprite(thing.name, boxes, side)
            alpha = sprite[:, 3]
            canvas = sprite[:, :3] + (1 - alpha[:, None]) * canvas
            covered = torch.maximum(covered, alpha)
        return canvas.clamp(0, 1).transpose(0, 1) * 2 - 1, covered

    def _sprite(self, name: str, boxes: Tensor, side: int) -> Tensor:
        """One object alone on the canvas, [T, 4, side, side], colours multiplied by alpha.

        boxes: [T, 3], centre and side, in shares of the canvas.
        """
        frames = len(boxes)
        small = float(boxes[frames // 2, 2]) * side <= self.halves.shape[2]
        source = self.halves if small else self.clips.rgba
        rgba = source[self.clips.names.index(name), :frames].permute(0, 3, 1, 2).float() / 255
        x, y, width = boxes.to(rgba.device).unbind(1)
        theta = torch.zeros(frames, 2, 3, device=rgba.device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / width
        theta[:, 0, 2], theta[:, 1, 2] = (1 - 2 * x) / width, (1 - 2 * y) / width
        grid = functional.affine_grid(theta, [frames, 4, side, side], align_corners=False)
        return functional.grid_sample(rgba, grid, "bilinear", "zeros", align_corners=False)


def latent_cover(covered: Tensor) -> Tensor:
    """Cover [T, H, W] of the pixels as [1+(T-1)/4, H/8, W/8] of the latents, the most of frames."""
    small = functional.avg_pool2d(covered[:, None], 8)[:, 0]
    rest = small[1:].unflatten(0, (-1, 4)).amax(1) if len(small) > 1 else small[1:]
    return torch.cat([small[:1], rest])
