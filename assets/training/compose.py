"""Scenes as pixels, on the device that holds the clips: objects on a backdrop, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from clips import Clips
from layout import Layout
from torch import Tensor
from torch.nn import functional

from dit_accel.evaluate import backdrop
from dit_accel.inputs.scene import Scene

LENGTH = 33  # frames of the clip whose first one an image is
OWNED = 0.3  # least share of a token that an object must cover to be what stands there


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
        self, scenes: Sequence[Scene], layouts: Sequence[Layout], side: int, frames: int
    ) -> tuple[Tensor, Tensor]:
        """Videos [B, 3, T, side, side] in [-1, 1], and how much of each cell of 8 × 8 pixels each
        object covers, [B, O, T, side/8, side/8].

        One frame is the first one of a clip of 33.
        """
        device = self.clips.rgba.device
        length = LENGTH if frames == 1 else frames
        times = torch.arange(frames) - (length - 1) / 2
        boxes = [layout.boxes_at(times) for layout in layouts]
        scales = torch.stack([torch.exp(times * layout.growth) for layout in layouts]).to(device)
        canvas = torch.stack([
            backdrop.draw(scene.backdrop, self.clips.colours, side, side, scale)
            for scene, scale in zip(scenes, scales, strict=True)
        ])  # fmt: skip
        most = max(len(scene.objects) for scene in scenes)
        cover = torch.zeros(len(scenes), most, frames, side // 8, side // 8, device=device)
        for number in range(most):
            rows = [n for n, scene in enumerate(scenes) if len(scene.objects) > number]
            names = [self.clips.names.index(scenes[n].objects[number].name) for n in rows]
            sprites = self._sprites(names, torch.stack([boxes[n][number] for n in rows]), side)
            alpha = sprites[:, :, 3]
            canvas[rows] = sprites[:, :, :3] + (1 - alpha[:, :, None]) * canvas[rows]
            cover[rows, number] = functional.avg_pool2d(alpha, 8)
        return canvas.clamp(0, 1).transpose(1, 2) * 2 - 1, cover

    def _sprites(self, names: list[int], boxes: Tensor, side: int) -> Tensor:
        """Objects alone on the canvas, [R, T, 4, side, side], colours multiplied by alpha.

        names: of the R clips, by number. boxes: [R, T, 3], centre and side, in shares of the
        canvas.
        """
        count, frames = boxes.shape[:2]
        x, y, width = boxes.to(self.clips.rgba.device).unbind(2)
        theta = torch.zeros(count, frames, 2, 3, device=x.device)
        theta[..., 0, 0] = theta[..., 1, 1] = 1 / width
        theta[..., 0, 2], theta[..., 1, 2] = (1 - 2 * x) / width, (1 - 2 * y) / width
        small = boxes[:, frames // 2, 2] * side <= self.halves.shape[2]
        out = torch.empty(count, frames, 4, side, side, device=x.device)
        for source, chosen in ((self.halves, small), (self.clips.rgba, ~small)):
            rows = chosen.nonzero().flatten().tolist()
            if not rows:
                continue
            rgba = source[[names[n] for n in rows], :frames].flatten(0, 1).permute(0, 3, 1, 2)
            grid = functional.affine_grid(
                theta[rows].flatten(0, 1), [len(rgba), 4, side, side], align_corners=False
            )
            drawn = functional.grid_sample(
                rgba.float() / 255, grid, "bilinear", "zeros", align_corners=False
            )
            out[rows] = drawn.unflatten(0, (-1, frames))
        return out


def latent_cover(cover: Tensor) -> Tensor:
    """[..., T, h, w] as [..., 1+(T-1)/4, h, w] of the latents, the most of four frames."""
    if cover.shape[-3] == 1:
        return cover
    first, rest = cover[..., :1, :, :], cover[..., 1:, :, :]
    return torch.cat([first, rest.unflatten(-3, (-1, 4)).amax(-3)], dim=-3)


def owners(cover: Tensor, classes: Tensor, patch: int = 2) -> Tensor:
    """[B, t, h/2, w/2] uint8: the class of the object that covers a token most, 0 for the backdrop.

    cover: [B, O, t, h, w], of latent_cover. classes: [B, O] integers from 1.
    """
    tokens = functional.avg_pool2d(cover.flatten(0, 2), patch).unflatten(0, cover.shape[:3])
    share, number = tokens.max(1)
    which = classes.gather(1, number.flatten(1)).view_as(number)
    return torch.where(share > OWNED, which, 0).to(torch.uint8)
