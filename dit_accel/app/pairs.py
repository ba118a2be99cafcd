"""What is made of records once they are there: a report in one file, and pairs across runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.media import quality, video
from dit_accel.media.pictures import read_picture
from dit_accel.pages import comparison

Clip = tuple[dict[str, Any], str, Path, str]  # record, side, folder, URL of the folder


def report(data: dict[str, Any], folder: Path) -> str:
    """The record of a pair as one self-contained page."""
    left, right = data["left"], data["right"]
    sheet = folder / "contact_sheet.png"
    names = (left["label"], right["label"])
    if not sheet.exists():
        first, second = (frames(folder / side["clip"]) for side in (left, right))
        video.save(sheet, video.contact_sheet(first, second, names)[None])
    ran = right["report"] or left["report"]
    return comparison.page(
        {
            **data,
            "names": ["left", "right"],
            "labels": names,
            "method": right["label"],
            "kept": ran["kept"] if ran else 1.0,
            "times": {"dense": left["times"], "accelerated": right["times"]},
            "attention": ran,
            "cells": right["cells"] or left["cells"],
            "python": right["python"].strip(),
            "command": "",
            "files": {
                "dense": left["clip"],
                "accelerated": right["clip"],
                "contact_sheet": sheet.name,
            },
        },
        folder,
    )


def pair(left: Clip, right: Clip) -> dict[str, Any]:
    """A record of two clips of two runs, measured on what their files show.

    ValueError where they differ in size.
    """
    ends = [dict(record[side]) for record, side, _, _ in (left, right)]
    clips = [frames(folder / record[side]["clip"]) for record, side, folder, _ in (left, right)]
    if clips[0].shape != clips[1].shape:
        raise ValueError("these clips differ in size: only equal ones can be held together")
    times = [end["times"] for end in ends]
    first, second = left[0], right[0]
    same = first["prompt"] == second["prompt"]
    kept = {key: value for key, value in second.items() if key != "both"}
    return {
        **kept,
        "asked": {**second.get("asked", {}), "left": first.get("asked", {}).get(left[1])},
        "prompt": second["prompt"] if same else f"{first['prompt']}” and “{second['prompt']}",
        "quality": quality.quality(*clips).to_dict(),
        "left": {**ends[0], "base": left[3]},
        "right": {**ends[1], "base": right[3]},
        "speedup": {part: times[0][part] / times[1][part] for part in ("denoise", "total")},
    }


def frames(path: Path) -> np.ndarray:
    """A clip or a picture as uint8 [T, H, W, 3]."""
    if path.suffix == ".png":
        return np.asarray(read_picture(path))[None]
    return video.read(path)
