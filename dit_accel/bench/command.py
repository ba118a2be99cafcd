"""The command line of `dit-accel bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from dit_accel.bench.operators import OPS, crossover, run_bench
from dit_accel.bench.results import store
from dit_accel.bench.shapes import SHAPES


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m dit_accel.bench`; with --e2e that of whole models."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--e2e" in words:
        from dit_accel.bench import end_to_end

        return end_to_end.main([word for word in words if word != "--e2e"])
    parser = argparse.ArgumentParser(prog="python -m dit_accel.bench", description=__doc__)
    parser.add_argument("--op", action="append", choices=OPS, help="default: all")
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--keep", action="append", type=float, help="default: 0.1")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--block", type=int, choices=(64, 128), help="default: 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--crossover", action="store_true", help="only the crossover lengths")
    parser.add_argument("--sweep", action="store_true", help="launches for this GPU, the fastest")
    parser.add_argument("--out", help="a JSON file to write")
    parser.add_argument("--e2e", action="store_true", help="whole models; see --e2e --help")
    given = parser.parse_args(words)
    if given.clock == "cpu":
        torch.set_num_threads(1)
    timing = {"rounds": given.rounds, "clock": given.clock}
    if given.crossover:
        found = crossover(given.device, **timing)
        for row in found:
            ratios = ", ".join(f"{n}: {ratio}" for n, ratio in row["ratios"].items())
            print(f"D={row['head_dim']} keep={row['keep']}: from {row['faster_from']} ({ratios})")
        if given.out:
            store(found, given.out)
        return 0
    if given.sweep:
        return _sweep(parser, given)
    dtype = getattr(torch, given.dtype) if given.dtype else None
    options = {"dtype": dtype, "block": given.block or 64, "echo": print, **timing}
    rows = run_bench(
        given.op or OPS, given.shape, given.keep or (0.1,), given.device, given.out, **options
    )
    return 0 if all(row["check"] == "passed" for row in rows) else 1


def _sweep(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    from dit_accel.bench import sweep

    unused = [name for name in ("op", "device", "dtype", "block") if getattr(given, name)]
    unused += ["keep"] * (len(given.keep or ()) > 1)
    if unused:
        parser.error(
            "--sweep times the block-sparse forward in bfloat16 on the GPU, with all blocks and at "
            f"one --keep: leave --{unused[0]} out" + " but once" * (unused[0] == "keep")
        )
    try:
        keep = (given.keep or [0.05])[0]
        sweep.sweep(given.shape or sweep.TRIED, keep, given.out, echo=print)
    except ValueError as error:
        parser.error(str(error))
    return 0
