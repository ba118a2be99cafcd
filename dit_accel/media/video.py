"""Pictures and clips on disk: atomic files, mp4 that browsers play, side-by-side, contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dit_accel.media.container import encode, rate, read
from dit_accel.media.files import atomic, check_target, elsewhere
from dit_accel.media.metadata import Facts, container_tags, picture_options

PAPER, INK = (250, 250, 249), (41, 37, 36)
__all__ = [
    "NotWritten",
    "contact_sheet",
    "difference",
    "rate",
    "read",
    "save",
    "save_or_rescue",
    "side_by_side",
]


class NotWritten(OSError):
    """A clip could not be written where it was asked for; the message says where it is kept."""

    exit_code = 1


def save(path: str | Path, frames: np.ndarray, fps: float = 16, facts: Facts | None = None) -> Path:
    """Write frames, uint8 [T, H, W, 3], in the format the name asks for; T = 1 is a picture.

    facts: what the file carries about how it was made (see `metadata`); None writes nothing.
    """
    path = check_target(path, moving=len(frames) > 1, room=0)
    with atomic(path) as temporary:
        if path.suffix.lower() == ".mp4":
            encode(temporary, frames, fps, container_tags(facts))
        else:
            pictures = [Image.fromarray(frame) for frame in frames]
            moving: dict[str, Any] = {"save_all": True, "append_images": pictures[1:], "loop": 0}
            timing = {"duration": round(1000 / fps), **moving} if len(frames) > 1 else {}
            options = picture_options(path.suffix.lower(), facts)
            pictures[0].save(temporary, quality=92, **timing, **options)
    return path


def save_or_rescue(
    path: str | Path, frames: np.ndarray, fps: float, facts: Facts | None = None
) -> Path:
    """`save`; where that fails the clip is kept elsewhere, and NotWritten names the place."""
    try:
        return save(path, frames, fps, facts)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        kept = elsewhere(frames.nbytes // 16)
        if kept is None:
            raise NotWritten(f"{path} cannot be written ({why}), nor anything else here") from error
        kept = save(kept / Path(path).name, frames, fps, facts)
        raise NotWritten(f"{path} cannot be written ({why}): the clip is in {kept}") from error


def side_by_side(
    left: np.ndarray, right: np.ndarray, labels: tuple[str, str] = ("", "")
) -> np.ndarray:
    """Two clips uint8 [T, H, W, 3] in one, [T, H + strip, 2W + gap, 3], each under its label."""
    _same(left, right)
    count, height, width = left.shape[:3]
    gap = max(4, width // 64)
    strip = _strip(2 * width + gap, [(0, labels[0]), (width + gap, labels[1])])
    canvas = np.empty((count, height + len(strip), 2 * width + gap, 3), np.uint8)
    canvas[:] = PAPER
    canvas[:, : len(strip)] = strip
    canvas[:, len(strip) :, :width] = left
    canvas[:, len(strip) :, width + gap :] = right
    return canvas


def difference(left: np.ndarray, right: np.ndarray, gain: int = 4) -> np.ndarray:
    """|left - right| × gain, uint8 like the clips: black where they agree."""
    _same(left, right)
    apart = np.abs(left.astype(np.int16) - right.astype(np.int16)) * gain
    return apart.clip(0, 255).astype(np.uint8)


def contact_sheet(
    dense: np.ndarray, accelerated: np.ndarray, names: tuple[str, str], columns: int = 6
) -> np.ndarray:
    """One picture uint8 [H', W', 3]: evenly spaced frames of both clips, and their difference."""
    _same(dense, accelerated)
    count, _, width = dense.shape[:3]
    picked = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))
    gap = max(4, width // 64)
    across = len(picked) * (width + gap) - gap
    rows: list[np.ndarray] = []
    clips = (dense, accelerated, difference(dense, accelerated))
    for name, clip in zip((*names, "difference x4"), clips, strict=True):
        places = [(i * (width + gap), f"frame {n + 1}") for i, n in enumerate(picked)]
        places[0] = (0, f"{name}, {places[0][1]}" if count > 1 else name)
        rows += [_strip(across, places), _row(clip[picked], gap)]
    return np.concatenate(rows)


def _row(frames: np.ndarray, gap: int) -> np.ndarray:
    paper = np.empty((frames.shape[1], gap, 3), np.uint8)
    paper[:] = PAPER
    pieces = [piece for frame in frames for piece in (frame, paper)]
    return np.concatenate(pieces[:-1], axis=1)


def _strip(width: int, texts: Sequence[tuple[int, str]], size: int = 15) -> np.ndarray:
    """A band of paper, uint8 [H, width, 3], with each text at its x."""
    picture = Image.new("RGB", (width, size + 11), PAPER)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    for x, text in texts:
        draw.text((x + 4, 4), text, INK, font)
    return np.asarray(picture)


def _same(left: np.ndarray, right: np.ndarray) -> None:
    if left.shape != right.shape:
        raise ValueError(f"the clips differ in shape: {left.shape} and {right.shape}")
