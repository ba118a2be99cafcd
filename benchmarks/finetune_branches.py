"""What each branch of SLA learns in a few steps: velocity error to the dense model, on a CPU.

    python benchmarks/finetune_branches.py --out results.json --steps 40

The tensors of the branches and of the projection are trained alone, in float32, on the same samples
with the same draws. Written after each row.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from dit_accel import SLA
from dit_accel.finetune import Settings, finetune
from dit_accel.machine import describe

ROWS: dict[str, dict[str, object]] = {
    "plain": {},
    "gate": {"combine": "gate"},
    **{name: {"branch": name} for name in ("decay", "gated", "rala", "rms", "gated & rms")},
    **{name: {"branch": name} for name in ("conv", "decay & conv", "memory", "latents")},
    "conv alone": {"linear": None, "branch": "conv"},
    "sub": {"select": "sub"},
    "learned": {"select": "learned"},
    "learned alone": {"linear": None, "select": "learned"},
}


_PLACES = ("out", "folder", "rows", "data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("out/branches"), help="of the runs")
    parser.add_argument("--model", help="folder; without it the embedded model")
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with ; between them")
    parser.add_argument("--data", default="self", help="prepared folder")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=17)
    args = parser.parse_args()
    base = Settings(
        out=str(args.folder / "plain"), model=args.model, samples=4, device="cpu", clips=0,
        size=(args.size, args.size), frames=args.frames, steps=args.steps, lr_warmup=5, ema=0.0,
        lr_projection=args.lr, save_every=args.steps, validate_every=args.steps,
    )  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    data = args.data
    for name in args.rows.split(";"):
        out = args.folder / name.replace(" & ", "-").replace(" ", "-")
        method = SLA(keep=args.keep, **ROWS[name])
        since = time.perf_counter()
        done = finetune(replace(base, out=str(out), data=data, method=method))
        data = str(out / "data") if data == "self" else data
        before, after = done.velocity_error
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        each = min(line["seconds"] for line in lines if "seconds" in line)
        row = {"before": before, "after": after, "seconds_a_step": each}
        found[name] = row
        told = {name: x for name, x in vars(args).items() if name not in _PLACES}
        text = json.dumps({"machine": describe("cpu"), "asked": told, "rows": found}, indent=1)
        args.out.write_text(text + "\n", "utf-8")
        seconds = time.perf_counter() - since
        print(f"{name}: {before:.4f} → {after:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
