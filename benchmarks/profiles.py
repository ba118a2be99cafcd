"""Which combinations of method, keep, selector, schedule and step cache make a profile.

    python benchmarks/profiles.py --out profiles.json            # the embedded model
    python benchmarks/profiles.py --out profiles.json --write    # … the best into speeds.json

Every candidate makes the clips of some prompts, each held against the dense clip of the same noise:
PSNR, how many steps were of which kind, and the time of the denoising loop (processor time of one
thread on a CPU, so run it with OMP_NUM_THREADS=1; wall time on a GPU). Rows that --out holds
already are not made again.

A profile is the candidate of the least work whose clips all reach its floor: computed · (1 − a +
a · kept), of the attention calls that are made, of the block pairs that these keep, and of a, the
share of attention in a dense step. Profiles are for other models, too, so a is that of Wan2.1 1.3B
at 480p (--share); in the embedded model it is 0.66.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dit_accel import api
from dit_accel.generation.loading import load_pipeline
from dit_accel.generation.options import How
from dit_accel.generation.request import Request
from dit_accel.generation.run import generate
from dit_accel.machine import describe
from dit_accel.media.quality import quality
from dit_accel.pipelines.denoisers import transformers_of

SPEEDS = Path(__file__).parents[1] / "dit_accel/generation/speeds.json"
FLOORS = {"conservative": 38.0, "balanced": 35.0, "fast": 30.0}  # dB, of every clip
PROMPTS = (
    "a rocket left of a ghost on a blue to pink background, moving up",
    "a koala below a tropical fish on a yellow to green background",
    "a small panda and a honeybee on a dotted white background, zooming in",
)

CACHES = (0.05, 0.06, 0.075, 0.1, 0.15, 0.2)
SHARE = 0.54  # dit-accel bench --e2e --rows stock+cudnn none, H100
SAFE, BALANCED, FAST = ({"method": f"shared:{preset}"} for preset in ("safe", "balanced", "fast"))
# Full steps early; beside a step cache some of them have none to serve.
EARLY = {"method": "shared", "keep": 0.05}
POOLED = {"method": "pooled", "select": "sub", "keep": 0.3}
RECTIFIED = {"method": "rectified", "select": "sub", "keep": 0.2}
CANDIDATES: list[dict[str, Any]] = [
    *({"method": "dense", "step_cache": x} for x in CACHES),
    *(
        {**base, **more}
        for base in (SAFE, BALANCED)
        for more in ({}, *({"step_cache": x} for x in CACHES))
    ),
    *({**FAST, "step_cache": x} for x in (0.1, 0.15, 0.2)),
    *({**EARLY, "keep": keep, "step_cache": x} for keep in (0.05, 0.1, 0.2) for x in (0.1, 0.15)),
    {**EARLY, "order": "tile", "step_cache": 0.1},
    *({**base, "step_cache": 0.1} for base in (POOLED, RECTIFIED)),
]
# Caches of diffusers that no profile takes: MagCache wants ratios calibrated for the model,
# TaylorSeer tensors for every module.
OTHERS = [
    {"method": "dense", "other": "taylorseer", "interval": 3},
    {**SAFE, "other": "taylorseer", "interval": 3},
    {"method": "dense", "other": "magcache"},
    {**SAFE, "other": "magcache"},
]


def name_of(candidate: dict[str, Any]) -> str:
    """The candidate as the command line would be told it."""
    return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in candidate.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="folder or id; the embedded model without it")
    parser.add_argument("--device")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of the list")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", help="candidates whose name holds one of these")
    parser.add_argument("--share", type=float, default=SHARE, help="of attention in a dense step")
    parser.add_argument("--choose", action="store_true", help="only from what --out holds")
    parser.add_argument("--write", action="store_true", help="the profiles into speeds.json")
    asked = parser.parse_args()
    known = json.loads(asked.out.read_text()) if asked.out.exists() else {"rows": []}
    if not asked.choose:
        known = make(asked, known["rows"])
    found = profiles(known["rows"], asked.share)
    print(json.dumps(found, indent=1))
    if asked.write:
        write(found, known, asked.share)


def make(asked: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows that are not there yet, written to --out after each of them."""
    pipe, defaults = load_pipeline(asked.model, asked.device)
    pipe.set_progress_bar_config(disable=True)
    device = transformers_of(pipe)[0].device.type
    prompts = list(PROMPTS[: asked.prompts])
    data = {"machine": describe(device), "clock": clock(device)[0], "steps": asked.steps}
    data |= {"model": asked.model or "the embedded model", "prompts": prompts}
    data |= {"frames": asked.frames or defaults.num_frames, "rows": rows}
    wanted = [c for c in CANDIDATES + OTHERS if chosen(name_of(c), asked.only)]
    for prompt in prompts:
        request = Request(prompt=prompt, steps=asked.steps, frames=asked.frames)
        made = {row["name"] for row in rows if row["prompt"] == prompt}
        if made.issuperset(map(name_of, wanted)):
            continue
        dense, seconds, _ = timed(pipe, defaults, request, {"method": "dense"})
        for candidate in wanted:
            if name_of(candidate) in made:
                continue
            clip, own, report = timed(pipe, defaults, request, candidate)
            near = quality(dense, clip).psnr_mean
            row = {"name": name_of(candidate), "options": candidate, "prompt": prompt}
            row |= {"psnr": round(near, 2), "time": round(own / seconds, 4)}
            row |= {"kept": round(report.kept, 4), "computed": computed(report)}
            row |= {"steps": Counter(kinds(report))}
            rows.append(row)
            print(json.dumps(row), flush=True)
            asked.out.write_text(json.dumps(data, indent=1) + "\n")
    return data


def chosen(name: str, only: list[str] | None) -> bool:
    return not only or any(text in name for text in only)


def clock(device: str) -> tuple[str, Callable[[], float]]:
    """Its name, and what tells the seconds."""
    if device == "cpu":
        return "processor", time.process_time

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return "wall", now


def timed(pipe: Any, defaults: Any, request: Request, candidate: dict[str, Any]) -> Any:
    """Frames, seconds of the denoising loop, report."""
    own = {k: v for k, v in candidate.items() if k not in ("other", "interval")}
    how = How(**own, min_tokens=0)
    _, now = clock(transformers_of(pipe)[0].device.type)
    marks: dict[str, float] = {}

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase == "denoise":
            marks.setdefault("begin", now())
            marks["end"] = now()

    with how.boost().cached(pipe), other_cache(pipe, candidate, request.steps):
        handle = api.accelerate(pipe, how.config())
        made = generate(pipe, defaults, request, progress)
        report = handle.report()
        handle.restore()
    return made.frames, marks["end"] - marks["begin"], report


@contextmanager
def other_cache(pipe: Any, candidate: dict[str, Any], steps: int | None) -> Iterator[None]:
    from diffusers import MagCacheConfig, TaylorSeerCacheConfig

    kind = candidate.get("other")
    with ExitStack() as stack:
        for transformer in transformers_of(pipe) if kind else ():
            if kind == "magcache":
                ratios = [1.0] * steps  # not calibrated: the model's change is taken to be none
                config = MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios)
            else:
                config = TaylorSeerCacheConfig(
                    cache_interval=candidate["interval"], disable_cache_before_step=3
                )
            transformer.enable_cache(config)
            stack.callback(transformer.disable_cache)
        yield


def kinds(report: Any) -> list[str]:
    """What each step of the last generation was: dense, full, sparse or skipped by a step cache.

    The first layer runs in skipped steps, too, and so has full steps of its own: a step is full
    where most of the attention is.
    """
    numbers = sorted({x["step"] for x in report.steps})
    steps = [[x for x in report.steps if x["step"] == n] for n in numbers]
    calls = [sum(x["sparse"] + x["dense"] for x in found) for found in steps]
    return [_kind(found, n < max(calls)) for found, n in zip(steps, calls, strict=True)]


def _kind(forwards: list[dict[str, Any]], fewer: bool) -> str:
    if fewer:
        return "skipped"
    if not any(x["sparse"] for x in forwards):
        return "dense"
    return "full" if min(x["kept"] for x in forwards) > 0.5 else "sparse"


def computed(report: Any) -> float:
    """Share of the attention calls that were made at all."""
    made = sum(step["sparse"] + step["dense"] for step in report.steps)
    return round(made / (len(report.layers) * len(report.steps)), 3)


def profiles(rows: list[dict[str, Any]], share: float) -> dict[str, dict[str, Any]]:
    """Name → the candidate of the least work whose clips all reach the floor, with its figures.

    One that was not tried on as many prompts as others does not count.
    """
    means, most = [], len({row["prompt"] for row in rows})
    for name in dict.fromkeys(row["name"] for row in rows if "other" not in row["options"]):
        mine = [row for row in rows if row["name"] == name]
        psnr, lowest = mean(row["psnr"] for row in mine), min(row["psnr"] for row in mine)
        cost, kept = mean(row["time"] for row in mine), mean(row["kept"] for row in mine)
        figures = {"psnr": round(psnr, 1), "lowest": round(lowest, 1), "kept": round(kept, 2)}
        work = mean(row["computed"] * (1 - share + share * row["kept"]) for row in mine)
        figures |= {"work": round(work, 3), "speedup": round(1 / cost, 2), "clips": len(mine)}
        means.append({"options": mine[0]["options"], "measured": figures})
    found = {}
    for name, floor in FLOORS.items():
        good = [row for row in means if fits(row["measured"], floor, most)]
        best = min(good, key=lambda row: row["measured"]["work"], default=None)
        if best is None:
            raise SystemExit(f"no candidate reaches the {floor} dB of {name!r}")
        found[name] = best
    return found


def fits(measured: dict[str, Any], floor: float, clips: int) -> bool:
    return measured["lowest"] >= floor and measured["clips"] == clips


def write(found: dict[str, dict[str, Any]], run: dict[str, Any], share: float) -> None:
    """The profiles into the package, with what they were measured on."""
    where = run["machine"]
    by = {"command": " ".join(["python benchmarks/profiles.py", *sys.argv[1:]]), "share": share}
    by |= {"machine": where["gpu"] or where["cpu"], "torch": where["torch"]}
    by |= {name: run[name] for name in ("model", "clock", "steps", "frames", "prompts")}
    for name, floor in FLOORS.items():
        found[name]["measured"] = {**found[name]["measured"], "floor": floor}
    SPEEDS.write_text(json.dumps({"measured_by": by, "profiles": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
