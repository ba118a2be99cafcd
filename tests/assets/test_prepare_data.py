"""Choosing and reading animations, on webp files made here."""

from pathlib import Path

import numpy as np
from PIL import Image


def _webp(path: Path, frames: int) -> None:
    images = []
    for t in range(frames):
        pixels = np.zeros((256, 256, 4), np.uint8)
        pixels[: t + 1] = (200, t, 0, 255)
        images.append(Image.fromarray(pixels))
    images[0].save(path, save_all=True, append_images=images[1:], duration=42, lossless=True)


def test_choose_keeps_long_animations_and_read_wraps_them(tmp_path: Path) -> None:
    from prepare_data import FRAMES, choose, read

    for stem, frames in {"1f680": 50, "1f419": 12, "1f44d-1f3fb": 50, "odd": 50}.items():
        _webp(tmp_path / f"{stem}.webp", frames)
    chosen = choose(tmp_path)
    assert chosen == [(tmp_path / "1f680.webp", "rocket", 50)]
    rgba = read(chosen[0][0])
    assert rgba.shape == (FRAMES, 256, 256, 4)
    assert (rgba[50:] == rgba[: FRAMES - 50]).all() and (rgba[1] != rgba[0]).any()


def test_coded_clip_keeps_colour_and_alpha(tmp_path: Path) -> None:
    from clips import decode
    from prepare_data import encode

    rgba = np.zeros((5, 64, 64, 4), np.uint8)
    rgba[:, 16:48, 16:48] = (200, 100, 50, 128)
    encode(rgba, tmp_path / "a.avif")
    again = decode(tmp_path / "a.avif").astype(int)
    expected = rgba.astype(int)
    expected[..., :3] = expected[..., :3] * expected[..., 3:] // 255
    assert np.abs(again - expected).mean() < 1.5
    assert list(tmp_path.iterdir()) == [tmp_path / "a.avif"]
