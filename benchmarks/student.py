"""A student of few steps beside its teacher, on the embedded model: recognised, PSNR, seconds.

    python benchmarks/student.py out/few4 --prompts 64 --batch 8 --out student.json
    python benchmarks/student.py assets/emoji-sla --sampler own --prompts 1 --out x.json  # a CPU

Rows: the dense model as it ships, the dense model in as many steps as the student has, by its own
scheduler and by the student's sampler, if that is another, and the student (what `dit-accel
finetune` wrote). PSNR is to the dense clip of the same noise. Seconds are medians of a clip's share
of a call, after one that is not timed: of the loop, and of the whole clip.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import torch

from dit_accel import accelerated
from dit_accel.config import AccelConfig, resolve
from dit_accel.evaluate import clips
from dit_accel.evaluate.scenes import recogniser
from dit_accel.generation import Boost, Request, load_pipeline
from dit_accel.generation.loading import EMBEDDED
from dit_accel.generation.options import parse_size
from dit_accel.inputs.prompts import read_prompts
from dit_accel.machine import describe
from dit_accel.media.quality import quality
from dit_accel.methods.dense import Dense
from dit_accel.samplers import sampling
from dit_accel.schedule import Schedule

DENSE = AccelConfig(Dense(), Schedule())


def rows(folder: Path, steps: int, sampler: str) -> dict[str, tuple[AccelConfig, Boost, dict]]:
    """Name → configuration, LoRA and what of the request differs."""
    student = replace(resolve(folder / "preset.json"), min_tokens=0)
    few: dict[str, object] = {"steps": steps, "guidance": 1.0}
    found = {
        "dense": (DENSE, Boost(), {}),
        f"dense, {steps} steps": (DENSE, Boost(), {"steps": steps}),
    }
    if sampler != "own":
        few["sampler"] = sampler
        found[f"dense, {steps} steps, {sampler}"] = DENSE, Boost(), few
    return {**found, f"student, {steps} steps": (student, Boost(lora=f"{folder}/lora"), few)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sampler", default="flow:3", help="own: the model's scheduler")
    parser.add_argument("--size", help="WxH; the model's own")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe, defaults = load_pipeline(None, device, None)
    judge = recogniser(None)
    assert not isinstance(judge, str), judge
    size = dict(zip(("width", "height"), parse_size(args.size), strict=True)) if args.size else {}
    prompts = read_prompts(EMBEDDED.parent / "prompts-report.txt")[: args.prompts]
    base = [Request(p, seed=n, **size) for n, p in enumerate(prompts)]
    parts = [base[i : i + args.batch] for i in range(0, len(base), args.batch)]
    dense: list[torch.Tensor] = []
    found: list[dict[str, object]] = []
    for name, (config, boost, changed) in rows(args.student, args.steps, args.sampler).items():
        asked = [[replace(r, **changed) for r in part] for part in parts]
        began, made = time.monotonic(), []
        with (
            boost.switch_on(pipe),
            accelerated(pipe, config) as handle,
            sampling(pipe, changed.get("sampler")),
        ):
            clips.make(pipe, defaults, asked[0])
            for part in asked:
                made += clips.make(pipe, defaults, part)
            kept = handle.report().kept
        frames = [clip.frames.cpu() for clip in made]
        dense = dense or frames
        told = judge.judge(prompts, frames)
        psnr = [quality(a.numpy(), b.numpy()).psnr_mean for a, b in zip(dense, frames, strict=True)]
        line = {"row": name, "clips": len(made), "attention_kept": kept,
                "seconds": median(c.seconds for c in made), "wall": median(c.wall for c in made),
                "psnr": None if frames is dense else fmean(psnr)}  # fmt: skip
        for key in sorted({k for t in told for k in t}):
            line[key] = fmean(t[key] for t in told if key in t)
        found.append({**line, "took": time.monotonic() - began, "each": told})
        print(json.dumps(line), flush=True)
        record = {"command": shlex.join(sys.argv), "machine": describe(device), "rows": found}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
