"""Finished pairs that come with the package, so that the page is alive at first sight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

from dit_accel.app import outcome
from dit_accel.app.ask import Ask, Side
from dit_accel.app.studio import Pair, Studio

FOLDER = Path(__file__).parents[1] / "assets" / "examples"
PAIRS = {
    "rocket": ("rocket on a blue background", Side("shared:balanced", keep=0.2)),
    "octopus": ("octopus on a yellow background", Side("rettention:safe", keep=0.25)),
    "unicorn": (
        "unicorn on a purple background",
        Side("pooled:safe", keep=0.5, prune="balanced"),
    ),
}


def stored(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Name → record of every example in `folder`, in the order of `PAIRS`."""
    files = ((name, folder / name / outcome.RECORD) for name in PAIRS)
    return {name: json.loads(file.read_text("utf-8")) for name, file in files if file.is_file()}


def make(studio: Studio, names: Sequence[str] = (), folder: Path = FOLDER) -> None:
    """Generate the named examples, or all, anew with the embedded model."""
    for name in names or PAIRS:
        if name not in PAIRS:
            raise ValueError(f"there is no example {name!r}: choose from {', '.join(PAIRS)}")
        prompt, side = PAIRS[name]
        ask = Ask(prompt, right=side)
        pair = next(item for item in studio.run(ask, Event()) if isinstance(item, Pair))
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        data = outcome.record(pair, folder / name)
        print(f"{name}: {data['speedup']['denoise']:.2f}×, {data['quality']['psnr_mean']:.1f} dB")
