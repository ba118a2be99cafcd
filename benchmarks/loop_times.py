"""Seconds of the denoising loop of rows of `dit-accel evaluate`, alone on the device.

    python benchmarks/loop_times.py --rows dense,shared/sub@0.1,dense+cache@0.1 --size 512x512 \
        --frames 65 --batch 1 8 --compile 0 1 --out times.json

Medians of --rounds generations after one that is not timed, and that one's own seconds, in which a
row compiles; with CUDA graphs after a second one, which is recorded, and how far the latents of the
last one, which was replayed, are from the first's. A row that fails holds its error. Every figure
is written as it is found.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median

import torch

from dit_accel import accelerated
from dit_accel.config import AccelConfig
from dit_accel.evaluate import clips
from dit_accel.evaluate.rows import Row, rows
from dit_accel.generation.loading import EMBEDDED, load_pipeline
from dit_accel.generation.options import parse_size
from dit_accel.generation.request import Request
from dit_accel.inputs.prompts import read_prompts
from dit_accel.machine import describe
from dit_accel.methods.dense import Dense
from dit_accel.schedule import Schedule


def timed(pipe, defaults, row: Row, base: Request, batch: int, rounds: int) -> dict:  # noqa: ANN001
    """Seconds of a clip's loop in calls of `batch`."""
    prompts = read_prompts(EMBEDDED.parent / "prompts-report.txt")[:batch]
    asked = [
        replace(base, prompt=p, seed=n, steps=row.steps or base.steps)
        for n, p in enumerate(prompts)
    ]
    with row.boost.switch_on(pipe), accelerated(pipe, row.config) as handle:
        began = time.monotonic()
        ran = clips.make(pipe, defaults, asked)
        told = {"first_call": time.monotonic() - began}
        if row.boost.graphs:
            began = time.monotonic()
            clips.make(pipe, defaults, asked)
            told["recorded"] = time.monotonic() - began
        found = [clips.make(pipe, defaults, asked) for _ in range(rounds)]
        seconds = [made[0].seconds for made in found]
        told |= {"apart": apart(ran, found[-1]), "unplanned": handle.report().unplanned}
    return {"seconds": median(seconds), "all": seconds, **told}


def apart(some: list[clips.Clip], others: list[clips.Clip]) -> float:
    """The largest relative difference of two calls' latents."""
    pairs = [(x.latents.float(), y.latents.float()) for x, y in zip(some, others, strict=True)]
    return max(float((x - y).norm() / x.norm()) for x, y in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", required=True, help="as of dit-accel evaluate, with their keep")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--compile", type=int, nargs="+", default=[0], help="0, 1 or both")
    parser.add_argument("--graphs", type=int, nargs="+", default=[0], help="0, 1 or both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=9.0, help="no row begins after these")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    began, device = time.monotonic(), "cuda" if torch.cuda.is_available() else "cpu"
    pipe, defaults = load_pipeline(None, device, None, False)
    width, height = parse_size(args.size)
    base = Request("a scene", steps=args.steps, width=width, height=height, frames=args.frames)
    names = args.rows.split(",")
    found = rows(names, (0.1,), args.steps, AccelConfig(Dense(), Schedule()))
    record = {"machine": describe(device), "command": shlex.join(sys.argv), "rows": []}
    record |= {"size": args.size, "frames": args.frames, "steps": args.steps}
    for compiled, batch, row, graphs in product(args.compile, args.batch, found, args.graphs):
        if time.monotonic() - began > 60 * args.minutes:
            break
        line = {"row": row.name, "batch": batch, "compiled": bool(compiled), "graphs": graphs > 0}
        try:
            boost = replace(row.boost, compile=bool(compiled), graphs=graphs > 0)
            row = replace(row, boost=boost)
            line |= timed(pipe, defaults, row, base, batch, args.rounds)
        except (RuntimeError, ValueError) as error:
            line["error"] = str(error).splitlines()[0]
        record["rows"].append(line)
        print(json.dumps(line), flush=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
