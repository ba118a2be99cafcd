"""What a clip was made from, carried in its file: one JSON text where each format keeps remarks.

mp4 and gif: the comment (mp4 also has the prompt as its title); png: an iTXt chunk; jpg and webp:
the user's comment of EXIF.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dit_accel.inputs.data import parse
from dit_accel.inputs.text import check_file, one_line
from dit_accel.media.container import tags

KEY = "dit_accel"  # of the version, which every such text holds
_EXIF, _COMMENT, _CODE = 0x8769, 0x9286, b"UNICODE\0"
Facts = Mapping[str, Any]


def pack(facts: Facts) -> str:
    """The text that a file carries."""
    return json.dumps(dict(facts), ensure_ascii=False, default=str)


def container_tags(facts: Facts | None) -> dict[str, str]:
    """Tags of an mp4."""
    if facts is None:
        return {}
    return {"title": one_line(str(facts.get("prompt", ""))), "comment": pack(facts)}


def picture_options(suffix: str, facts: Facts | None) -> dict[str, Any]:
    """What Pillow's `save` is given for a file with this suffix."""
    if facts is None:
        return {}
    if suffix == ".gif":
        return {"comment": pack(facts).encode()}
    if suffix == ".png":
        info = PngInfo()
        info.add_itxt(KEY, pack(facts))
        info.add_itxt("Description", one_line(str(facts.get("prompt", ""))))
        info.add_text("Software", f"dit-accel {facts.get(KEY, '')}")
        return {"pnginfo": info}
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_COMMENT] = _CODE + pack(facts).encode("utf-16-le")
    return {"exif": exif}


def read(path: str | Path) -> dict[str, object] | None:
    """The facts that a clip or picture carries; None where it carries none of ours.

    Raises ValueError for a file that cannot be read as the kind its name says.
    """
    check_file(path, "clip")
    try:
        text = _comment(Path(path))
    except MemoryError:
        raise
    except Exception as error:  # whatever the parsers of damaged files raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a clip or picture: {why}") from None
    try:
        found = parse(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and KEY in found else None


def _comment(path: Path) -> str:
    if path.suffix.lower() in (".mp4", ".m4v", ".mov"):
        return tags(path).get("comment", "")
    with Image.open(path) as picture:
        if KEY in picture.info:
            return str(picture.info[KEY])
        if "comment" in picture.info:
            return bytes(picture.info["comment"]).decode(errors="replace")
        comment = picture.getexif().get_ifd(_EXIF).get(_COMMENT, b"")
        return bytes(comment).removeprefix(_CODE).decode("utf-16-le", errors="replace")
