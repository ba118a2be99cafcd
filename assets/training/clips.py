"""The training clips on the device: decoded once to uint8, put on a background when drawn."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def decode(path: Path) -> np.ndarray:
    """Colour-times-alpha and alpha of one clip, side by side in its frames, [T, H, W, 4] uint8."""
    with Image.open(path) as image:
        frames = []
        for number in range(image.n_frames):
            image.seek(number)
            both = np.asarray(image.convert("RGB"))
            colour, alpha = np.split(both, 2, axis=1)
            frames.append(np.concatenate([colour, alpha[..., 1:2]], axis=-1))
    return np.stack(frames)


@dataclass(frozen=True)
class Clips:
    """rgba: [N, T, H, W, 4] uint8, colours multiplied by alpha; held_out: index of a colour."""

    rgba: Tensor
    names: list[str]
    colours: dict[str, tuple[int, int, int]]
    held_out: list[int]
    fps: int

    @classmethod
    def load(
        cls, folder: Path, device: str | torch.device, limit: int | None = None, stride: int = 1
    ) -> Clips:
        """Decode every `stride`-th frame of the archive; ValueError when it is not one."""
        manifest_file = folder / "captions.json"
        if not manifest_file.exists():
            raise ValueError(f"Expected {manifest_file}, found none; run prepare_data.py first.")
        manifest = json.loads(manifest_file.read_text())
        entries = manifest["clips"][:limit]
        size, frames = manifest["size"], len(range(0, manifest["frames"], stride))
        rgba = torch.empty(len(entries), frames, size, size, 4, dtype=torch.uint8, device=device)
        with ProcessPoolExecutor() as pool:
            decoded = pool.map(decode, [folder / entry["file"] for entry in entries])
            for number, clip in enumerate(decoded):
                rgba[number] = torch.from_numpy(clip[::stride][:frames]).to(device)
        names = list(manifest["colours"])
        return cls(
            rgba,
            [entry["name"] for entry in entries],
            {name: tuple(rgb) for name, rgb in manifest["colours"].items()},
            [names.index(entry["held_out"]) for entry in entries],
            manifest["fps"],
        )

    def palette(self) -> Tensor:
        """Colours as [C, 3] floats in [0, 255] on the clips' device."""
        return torch.tensor(list(self.colours.values()), device=self.rgba.device).float()

    def trained_pairs(self) -> list[tuple[int, int]]:
        """(emoji, colour) indices without the held-out pairs."""
        every = range(len(self.colours))
        return [(n, c) for n, out in enumerate(self.held_out) for c in every if c != out]


def composite(rgba: Tensor, background: Tensor) -> Tensor:
    """Put [B, T, H, W, 4] uint8 on backgrounds [B, 3] in [0, 255]; [B, 3, T, H, W] in [-1, 1]."""
    alpha = rgba[..., 3:].float() / 255
    frames = rgba[..., :3].float() + (1 - alpha) * background[:, None, None, None, :]
    return frames.clamp(0, 255).permute(0, 4, 1, 2, 3) / 127.5 - 1
