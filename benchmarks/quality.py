"""How near each method's clips are to dense ones of the same seed; the control is fewer steps.

    python benchmarks/quality.py --seconds 230     again and again until it says that all is done

Each finished clip is written to the results at once, so that a run can stop and go on. `kept` is
the share of attention work done over the whole run; for fewer dense steps, steps over all steps.
PSNR and SSIM are those of the pixels of the first `--decode` latent frames (a Wan model's).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dit_accel import Dense, Pooled, Rectified, Rettention, TopK, accelerated
from dit_accel.generate import Request, arguments
from dit_accel.loading import EMBEDDED, load_pipeline
from dit_accel.methods import Method
from dit_accel.metrics import latent_error, quality

PROMPTS = (
    "rocket on a blue background",
    "octopus on a white background",
    "ghost on a black background",
    "unicorn on a pink background",
)
SHARES = (1.0, 0.84, 0.68, 0.52, 0.4, 0.32)  # of the steps, for the control


def methods(keep: float) -> dict[str, Method]:
    """The rows at one keep."""
    plain = {"mass": 0.0, "neighbours": None}
    return {
        "pooled": Pooled(keep),
        "topk": TopK(keep),
        "re-ttention": Rettention(keep),
        "rectified": Rectified(keep, gapr=False, **plain),
        "rectified, GAPR": Rectified(keep, **plain),
        "re-ttention, pooled": Rettention(keep, residual="pooled"),
        "ditfastattn": Rettention(keep, rescale=False),
    }


def plan(orders: list[str], keeps: list[float], steps: int) -> list[tuple[str, Method, int, str]]:
    """(row, method, steps, order), the controls first."""
    counts = (round(share * steps) for share in SHARES[1:])
    rows = [(f"dense, {n} steps", Dense(), n, "raster") for n in counts]
    for order in orders:
        for keep in keeps:
            for name, method in methods(keep).items():
                rows.append((f"{name} {keep} {order}", method, steps, order))
    return rows


def run(pipe, defaults, prompt, seed, method, steps, order, kept_steps):
    """Latents and the share of attention work, of that of a dense run of `kept_steps`."""
    values = arguments(pipe, defaults, Request(prompt, seed=seed, steps=steps))
    with accelerated(pipe, method, order=order, min_tokens=0) as handle:
        latents = pipe(**values, output_type="latent").frames
        return latents, handle.report().kept * steps / kept_steps


def decode(pipe, latents: torch.Tensor, count: int | None) -> np.ndarray:
    """Frames uint8 [T, H, W, 3] of the first `count` latent frames."""
    config = pipe.vae.config
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std)
    )
    latents = latents[:, :, :count].float() * std + mean
    with torch.no_grad():
        pixels = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
    pixels = (pixels[0].float().clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(1, 2, 3, 0).numpy()


def reference(pipe, defaults, prompt: str, seed: int, steps: int, work: Path) -> torch.Tensor:
    """The dense latents, kept in `work` from one call of this script to the next."""
    path = work / f"{prompt} {seed} {steps}.safetensors".replace(" ", "-")
    if not path.exists():
        latents, _ = run(pipe, defaults, prompt, seed, Dense(), steps, "raster", steps)
        work.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents.contiguous()}, path)
    return load_file(path)["latents"]


def fill(data: dict, pipe, defaults, options) -> bool:
    """Add clips until the time is up; True when none is left."""
    steps = options.steps or defaults.num_inference_steps
    begin, rows = time.monotonic(), plan(options.order, options.keep, steps)
    if options.rows:
        rows = sorted(
            (r for r in rows if r[0] in options.rows), key=lambda r: options.rows.index(r[0])
        )
    for prompt in PROMPTS[: options.prompts]:
        for seed in options.seeds:
            done = data["clips"].setdefault(f"{prompt} #{seed}", {})
            dense = None
            for name, method, count, order in (row for row in rows if row[0] not in done):
                if time.monotonic() - begin > options.seconds:
                    return False
                if dense is None:
                    dense = reference(pipe, defaults, prompt, seed, steps, options.work)
                    frames = decode(pipe, dense, options.decode)
                latents, kept = run(pipe, defaults, prompt, seed, method, count, order, steps)
                found = quality(frames, decode(pipe, latents, options.decode))
                done[name] = {
                    "kept": round(kept, 4),
                    "psnr": round(found.psnr_mean, 3),
                    "ssim": round(found.ssim_mean, 4),
                    "latent_error": round(latent_error(dense, latents), 4),
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
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--steps", type=int, help="the model's default when left out")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many")
    parser.add_argument("--decode", type=int, help="latent frames to decode; all when left out")
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="dense latents")
    parser.add_argument("--rows", nargs="+", help="only these, in this order")
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
