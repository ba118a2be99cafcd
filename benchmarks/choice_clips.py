"""How far clips are from dense when blocks are chosen otherwise: latents, the embedded model.

    python benchmarks/choice_clips.py --out results.json --prompts rocket,octopus

Decibels are −20·log₁₀ of ‖x − x_dense‖ / ‖x_dense‖ for the same noise. Written after each prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_accel import accelerated
from dit_accel.config import AccelConfig, named
from dit_accel.generation.loading import load_pipeline
from dit_accel.generation.request import Request, arguments
from dit_accel.schedule import Schedule

CURVE = Schedule(step_keep=((3, 0.5), (7, 0.15), (13, 0.07)))
EARLY = Schedule(refresh=(5, 8, 12))
# Name → method, reuse, schedule and order; the rows of a pair keep the same.
ROWS: dict[str, tuple[str, str, Schedule, str]] = {
    "shared": ("shared@0.2", "none", Schedule(), "raster"),
    "shared/sub": ("shared/sub@0.2", "none", Schedule(), "raster"),
    "shared/sub+passes": ("shared/sub@0.2", "passes", Schedule(), "raster"),
    "shared, early": ("shared@0.2", "none", EARLY, "raster"),
    "shared/sub+passes, early": ("shared/sub@0.2", "passes", EARLY, "raster"),
    "shared/sub+passes, early, tile": ("shared/sub@0.2", "passes", EARLY, "tile"),
    "topk": ("topk@0.2", "none", Schedule(), "raster"),
    "topk/sub": ("topk/sub@0.2", "none", Schedule(), "raster"),
    "topk/sub+passes": ("topk/sub@0.2", "passes", Schedule(), "raster"),
    "topk, curve": ("topk@0.2", "none", CURVE, "raster"),
    "topk/sub+passes, curve": ("topk/sub@0.2", "passes", CURVE, "raster"),
    "pooled": ("pooled@0.2", "none", Schedule(), "raster"),
    "pooled/sub+passes, curve": ("pooled/sub@0.2", "passes", CURVE, "raster"),
}


def config(row: str) -> AccelConfig:
    """The configuration of a row; with `early`, full steps at no other steps."""
    text, reuse, schedule, order = ROWS[row]
    method = replace(named(text), reuse=reuse)
    if schedule is EARLY:
        method = replace(method, period=1.0)
    return AccelConfig(method, schedule, order=order, min_tokens=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", default="rocket,octopus")
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with ; between them")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--guidance", type=float, default=3.0)
    options = parser.parse_args()
    pipe, defaults = load_pipeline(None)
    pipe.set_progress_bar_config(disable=True)

    def latents(prompt: str, how: AccelConfig | None) -> tuple[torch.Tensor, float]:
        asked = Request(prompt, seed=3, guidance=options.guidance, frames=options.frames)
        values = arguments(pipe, defaults, asked)
        if how is None:
            return pipe(**values, output_type="latent").frames.float(), 1.0
        with accelerated(pipe, how) as handle:
            found = pipe(**values, output_type="latent").frames.float()
            return found, handle.report().kept

    rows: dict[str, list[dict[str, Any]]] = {}
    for prompt in options.prompts.split(","):
        dense, _ = latents(prompt, None)
        for name in options.rows.split(";"):
            found, kept = latents(prompt, config(name))
            db = -20 * math.log10((found - dense).norm() / dense.norm())
            rows.setdefault(name, []).append({"prompt": prompt, "db": db, "kept": kept})
            print(f"{prompt:12} {name:32} {db:6.2f} dB, kept {kept:.3f}", flush=True)
        facts = {"device": str(dense.device), "torch": torch.__version__}
        record = {**facts, "command": shlex.join(sys.argv), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
