"""PSNR and SSIM of each method's clips against dense ones of the same seed; control: fewer steps.

    python benchmarks/quality.py --seconds 230     again and again until it says that all is done

Each finished clip is written to the results at once, so that a run can stop and go on. `kept` is
the share of attention work done over the whole run; for fewer dense steps, steps over all steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from dit_accel import Dense, Pooled, Rectified, Rettention, TopK, accelerated
from dit_accel.generate import Request, generate
from dit_accel.loading import EMBEDDED, load_pipeline
from dit_accel.methods import Method
from dit_accel.metrics import latent_error, quality

PROMPTS = (
    "rocket on a blue background",
    "octopus on a white background",
    "ghost on a black background",
    "unicorn on a pink background",
)
KEEPS = (0.5, 0.2)
STEPS = (21, 17, 13, 10, 8)


def methods(keep: float) -> dict[str, Method]:
    """The rows at one keep."""
    return {
        "topk": TopK(keep),
        "pooled": Pooled(keep),
        "rectified": Rectified(keep, gapr=False, mass=0, neighbours=None),
        "rectified, GAPR": Rectified(keep, mass=0, neighbours=None),
        "re-ttention": Rettention(keep),
        "re-ttention, pooled": Rettention(keep, residual="pooled"),
        "ditfastattn": Rettention(keep, rescale=False),
    }


def plan(orders: list[str]) -> list[tuple[str, Method, int | None, str]]:
    """(row, method, steps, order), the controls first."""
    rows = [(f"dense, {n} steps", Dense(), n, "raster") for n in STEPS]
    for order in orders:
        for keep in KEEPS:
            for name, method in methods(keep).items():
                rows.append((f"{name} {keep} {order}", method, None, order))
    return rows


def run(pipe, defaults, prompt, seed, method, steps, order):
    request = Request(prompt, seed=seed, steps=steps)
    with accelerated(pipe, method, order=order, min_tokens=0) as handle:
        result = generate(pipe, defaults, request)
        kept = handle.report().kept
    all_steps = defaults.num_inference_steps
    return result, kept * (steps or all_steps) / all_steps


def fill(data: dict, pipe, defaults, options) -> bool:
    """Add clips until the time is up; True when none is left."""
    begin, rows = time.monotonic(), plan(options.order)
    for prompt in PROMPTS:
        for seed in options.seeds:
            done = data["clips"].setdefault(f"{prompt} #{seed}", {})
            left = [row for row in rows if row[0] not in done]
            if not left:
                continue
            reference, _ = run(pipe, defaults, prompt, seed, Dense(), None, "raster")
            for name, method, steps, order in left:
                if time.monotonic() - begin > options.seconds:
                    return False
                result, kept = run(pipe, defaults, prompt, seed, method, steps, order)
                found = quality(reference.frames, result.frames)
                done[name] = {
                    "kept": round(kept, 4),
                    "psnr": round(found.psnr_mean, 3),
                    "ssim": round(found.ssim_mean, 4),
                    "latent_error": round(latent_error(reference.latents, result.latents), 4),
                }
                options.out.write_text(json.dumps(data, indent=1) + "\n")
    return True


def table(data: dict) -> str:
    """Markdown: the mean of each row over the clips that have it."""
    lines = ["| row | clips | kept | PSNR | SSIM | latent error |", "|---|---|---|---|---|---|"]
    clips = list(data["clips"].values())
    for name in dict.fromkeys(name for clip in clips for name in clip):
        found = [clip[name] for clip in clips if name in clip]
        means = (sum(x[key] for x in found) / len(found) for key in found[0])
        kept, psnr, ssim, error = means
        lines.append(
            f"| {name} | {len(found)} | {kept:.3f} | {psnr:.2f} | {ssim:.4f} | {error:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="folder or id; the embedded model when left out")
    parser.add_argument("--order", nargs="+", default=["raster"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-quality.json"))
    options = parser.parse_args()
    data = json.loads(options.out.read_text()) if options.out.exists() else {"clips": {}}
    if options.seconds > 0:
        data["command"] = " ".join(["python", *sys.argv])
        data["model"] = options.model or EMBEDDED.name
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        data["machine"] = machine
        pipe, defaults = load_pipeline(options.model)
        pipe.set_progress_bar_config(disable=True)
        done = fill(data, pipe, defaults, options)
        print("all done" if done else "time is up: run again to go on", file=sys.stderr)
    print(table(data))


if __name__ == "__main__":
    main()
