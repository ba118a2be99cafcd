"""One command for the whole training; run it as often as needed, each time with --resume.

    python assets/training/train.py --stage all --data data/emoji --out runs/emoji --minutes 9
    python assets/training/train.py --stage dit --resume --minutes 9

A checkpoint appears every minute, in shards of at most 15 MiB, so a run that is cut off loses
little. The optimizers are warmed up anew; the step count and the time go on where they stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import train_dit
import train_vae
from clips import Clips
from models import TINY, Sizes

VAE_MINUTES, DIT_MINUTES = 7.0, 17.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=["vae", "dit", "all"], default="all")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, default=Path("data/run"))
    parser.add_argument("--minutes", type=float, default=9.0, help="time of this run")
    parser.add_argument("--vae-minutes", type=float, default=VAE_MINUTES, help="of all runs")
    parser.add_argument("--dit-minutes", type=float, default=DIT_MINUTES, help="of all runs")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--max-steps", type=int, help="stop a stage after so many steps")
    parser.add_argument("--limit", type=int, help="only the first N emoji")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the command")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    clips = Clips.load(args.data, args.device, args.limit)
    print(f"{len(clips.names)} clips, {clips.rgba.nbytes / 1e9:.2f} GB on {args.device}")
    stages = ["vae", "dit"] if args.stage == "all" else [args.stage]
    plan = {"vae": (train_vae.train, args.vae_minutes), "dit": (train_dit.train, args.dit_minutes)}
    start = time.monotonic()
    for stage in stages:
        train, total = plan[stage]
        resume = args.resume and (args.out / stage / "state.json").exists()
        if args.resume and not resume and args.stage != "all":
            raise SystemExit(f"Expected a checkpoint in {args.out / stage}; run without --resume.")
        sizes, left = TINY if args.tiny else Sizes(), args.minutes - (time.monotonic() - start) / 60
        progress = train(
            clips,
            args.out,
            sizes,
            max(0.1, left),
            total,
            resume,
            args.max_steps,
            not args.no_compile,
        )
        print(f"{stage}: {progress.step} steps, {progress.seconds:.0f} s in all")


if __name__ == "__main__":
    main()
