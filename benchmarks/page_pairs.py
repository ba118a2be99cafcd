"""The page's examples run as a visitor would run them: loops of both sides, and the wait.

    python benchmarks/page_pairs.py --out pairs.json
    python benchmarks/page_pairs.py --out pairs.json --size 512x512 --frames 65

Each pair twice, the second time warm; on a GPU also without replaying what waits for Python.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import torch

from dit_accel.app import examples, form, replay
from dit_accel.app.ask import Limits
from dit_accel.app.studio import Studio
from dit_accel.machine import describe
from dit_accel.media.quality import quality


def pair(studio: Studio, ask: Any) -> dict[str, Any]:
    """One visit: labels, seconds of the loops, their ratio, closeness, seconds until it ends."""
    began = time.perf_counter()
    found = studio.run(ask, Event())
    wall = time.perf_counter() - began
    sides = (found.left, found.right)
    loops = [side.result.times.denoise for side in sides]
    near = quality(found.left.result.frames, found.right.result.frames)
    return {
        "labels": [side.label for side in sides],
        "loops": loops,
        "speedup": loops[0] / loops[1],
        "psnr": near.psnr_mean,
        "wall": wall,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size")
    parser.add_argument("--frames", type=int)
    args = parser.parse_args()
    studio, rows = Studio(), []
    studio.warm()
    for values in examples.planned().values():
        ask = form.read(values, Limits(), opened=examples._nothing)
        sized = {"size": args.size, "frames": args.frames}
        ask = replace(ask, what=replace(ask.what, **{k: v for k, v in sized.items() if v}))
        for replays in (True, False) if torch.cuda.is_available() else (True,):
            with patch.object(replay, "could", lambda how, replays=replays: replays):
                visits = [pair(studio, ask) for _ in range(2)]
            rows.append({"prompt": ask.what.prompt, "replays": replays, "visits": visits})
            print(json.dumps(rows[-1]), flush=True)
            head = {"command": shlex.join(sys.argv), "machine": describe(studio.where.type)}
            args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
