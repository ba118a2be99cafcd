"""Scenes as pixels, on the device that holds the clips: objects on a backdrop, frame by frame."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from clips import Clips
from layout import Layout
from torch import Tensor
from torch.nn import functional

from dit_accel.scene import Backdrop, Scene

PERIOD = 64.0  # pixels between stripes and between dots, on every canvas
_EDGE = 6.0


def backdrop(
    what: Backdrop, colours: dict[str, tuple[int, int, int]], side: int, scales: Tensor
) -> Tensor:
    """[T, 3, side, side] in [0, 1]; scales: [T], how much larger its pattern is in each frame."""
    device = scales.device
    first = torch.tensor(colours[what.colour], device=device).float() / 255
    steps = (torch.arange(side, device=device) + 0.5 - side / 2) / scales[:, None]  # [T, side]
    y, x = steps[:, :, None], steps[:, None, :]
    if what.pattern == "plain":
        return first.view(1, 3, 1, 1).expand(len(scales), 3, side, side)
    if what.pattern == "ramp":
        second = torch.tensor(colours[what.second], device=device).float() / 255
        share = (y / side + 0.5).clamp(0, 1).expand(-1, side, side)
    else:
        bright = float(first.mean()) > 0.65
        second = first * 0.8 if bright else first + (1 - first) * 0.3
        wave = 2 * math.pi / PERIOD
        if what.pattern == "striped":
            level = torch.sin((x + y) * wave)
        else:
            level = torch.cos(x * wave) + torch.cos(y * wave) - 0.8
        share = torch.sigmoid(_EDGE * level)
    share = share[:, None]
    return (1 - share) * first.view(1, 3, 1, 1) + share * second.view(1, 3, 1, 1)


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

    def draw(self, scene: Scene, layout: Layout, side: int, frames: int) -> tuple[Tensor, Tensor]:
        """Video [3, T, side, side] in [-1, 1] and how much of it objects cover, [T, side, side]."""
        device = self.clips.rgba.device
        times = torch.arange(frames, device=device) - (frames - 1) / 2
        scales = torch.exp(layout.growth * times)
        canvas = backdrop(scene.backdrop, self.clips.colours, side, scales)
        covered = torch.zeros(frames, side, side, device=device)
        for number, thing in enumerate(scene.objects):
            sprite = self._sprite(thing.name, layout, number, side, frames)
            alpha = sprite[:, 3]
            canvas = sprite[:, :3] + (1 - alpha[:, None]) * canvas
            covered = torch.maximum(covered, alpha)
        return canvas.clamp(0, 1).transpose(0, 1) * 2 - 1, covered

    def _sprite(self, name: str, layout: Layout, number: int, side: int, frames: int) -> Tensor:
        """One object alone on the canvas, [T, 4, side, side], colours multiplied by alpha."""
        device = self.clips.rgba.device
        small = layout.boxes[number][2] * side <= self.halves.shape[2]
        source = self.halves if small else self.clips.rgba
        rgba = source[self.clips.names.index(name), :frames].permute(0, 3, 1, 2).float() / 255
        middle = (frames - 1) / 2
        boxes = torch.tensor([layout.at(number, t - middle) for t in range(frames)], device=device)
        x, y, width = boxes.unbind(1)
        theta = torch.zeros(frames, 2, 3, device=device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / width
        theta[:, 0, 2], theta[:, 1, 2] = (1 - 2 * x) / width, (1 - 2 * y) / width
        grid = functional.affine_grid(theta, [frames, 4, side, side], align_corners=False)
        return functional.grid_sample(rgba, grid, "bilinear", "zeros", align_corners=False)


def latent_cover(covered: Tensor) -> Tensor:
    """Cover [T, H, W] of the pixels as [1+(T-1)/4, H/8, W/8] of the latents, the most of frames."""
    small = functional.avg_pool2d(covered[:, None], 8)[:, 0]
    rest = small[1:].unflatten(0, (-1, 4)).amax(1) if len(small) > 1 else small[1:]
    return torch.cat([small[:1], rest])
