"""Finished pairs that come with the package, so that the page is alive at first sight."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

from dit_accel.app import form, outcome
from dit_accel.app.ask import Limits
from dit_accel.app.catalog import card
from dit_accel.app.studio import Studio

FOLDER = Path(__file__).parents[1] / "assets" / "examples"
# What the right side runs in each: the prompts are the model's own.
SIDES = (
    {"speed": "balanced"},
    {"speed": "conservative"},
    {"speed": "fast"},
)


def stored(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """Name → record of every example in `folder`, the one that gained most first."""
    files = sorted(folder.glob(f"*/{outcome.RECORD}"))
    found = {file.parent.name: json.loads(file.read_text("utf-8")) for file in files}
    return dict(sorted(found.items(), key=lambda item: -item[1]["speedup"]["denoise"]))


def planned() -> dict[str, dict[str, Any]]:
    """Name → values of the form, of the examples that are made for the embedded model."""
    words = card(None).words
    prompts = words.examples(len(SIDES)) if words else []
    return {
        f"{number}-{re.sub(r'[^a-z]+', '-', prompt.split(' on ')[0])}": {
            "prompt": prompt,
            "left": {"method": "dense"},
            "right": side,
        }
        for number, (prompt, side) in enumerate(zip(prompts, SIDES, strict=False), 1)
    }


def make(studio: Studio, names: Sequence[str] = (), folder: Path = FOLDER) -> None:
    """Generate the named examples, or all, anew with the embedded model, in place of others."""
    plans = planned()
    for name in names or plans:
        if name not in plans:
            raise ValueError(f"there is no example {name!r}: choose from {', '.join(plans)}")
    for old in [] if names else stored(folder):
        shutil.rmtree(folder / old)
    for name in names or plans:
        ask = form.read(plans[name], Limits(), opened=_nothing)
        pair = studio.run(ask, Event())
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
        data = outcome.record(pair, folder / name, plans[name])
        print(f"{name}: {data['speedup']['denoise']:.2f}×, {data['quality']['psnr_mean']:.1f} dB")


def _nothing(kind: str, token: str) -> Path:
    raise ValueError(f"an example takes no {kind}")
