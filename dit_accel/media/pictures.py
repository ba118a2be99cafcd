"""The one reader of pictures: upright, 8 bits, RGB, nothing hidden."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from dit_accel.inputs.text import read_bytes

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MOST_PIXELS = 100_000_000
_MOST = f"at most {MOST_PIXELS:,} are read"
BACKGROUND = (255, 255, 255)  # what shows through where a picture is transparent
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def read_picture(path: str | Path) -> Image.Image:
    """A picture as RGB; its first frame where it has several.

    It is turned as its EXIF orientation says, 16 bits are scaled to 8, and what is transparent
    shows white. `filename` is the path. Raises ValueError, in one sentence, for what is no picture,
    is cut off, has more than 100 million pixels or numbers that are not levels of grey.
    """
    data = io.BytesIO(read_bytes(path, "picture"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()  # Pillow knows few formats until then
            with Image.open(data, formats=[x for x in FORMATS if x in Image.OPEN]) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise _Refused(f"has {width} × {height} pixels: {_MOST}")
                found = _plain(ImageOps.exif_transpose(picture))
    except _Refused as refused:
        raise ValueError(f"picture {path} {refused}") from None
    except Image.DecompressionBombError:
        raise ValueError(f"picture {path} has too many pixels: {_MOST}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers do
        raise ValueError(f"picture {path} cannot be read: {_short(error)}") from None
    found.filename = str(path)  # type: ignore[attr-defined] # Pillow declares it of files only
    return found


class _Refused(Exception):
    """Said by us."""


def _plain(picture: Image.Image) -> Image.Image:
    if picture.mode in _DEEP:
        return _eight_bits(picture)
    if picture.mode == "F":
        raise _Refused("holds floating-point numbers: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        seen = picture.convert("RGBA")
        below = Image.new("RGBA", seen.size, BACKGROUND)
        return Image.alpha_composite(below, seen).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    levels = np.asarray(picture).astype(np.int64)
    if levels.min() < 0 or levels.max() > 65535:
        raise _Refused("holds 32-bit numbers: save it with 8 or 16 bits")
    return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")


def _short(error: BaseException) -> str:
    text: Any = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return "it is no picture" if text.startswith("cannot identify") else text.rstrip(".")
