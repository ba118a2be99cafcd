"""Operator benchmarks: map and attention together against dense attention, side by side.

    python -m dit_accel.bench --op pooled_attention --shape wan1.3b-480p --keep 0.05 --out rows.json
    python -m dit_accel.bench --e2e --help

A row gives times, TFLOP/s of the kept work and the error; its ratio stands only if the error check
passes. Dense and sparse rounds alternate, so that a busy machine slows both; --clock cpu counts the
processor time of one thread, which other programs hardly disturb.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import baselines, dispatch, ops
from dit_accel.table import BlockTable
from dit_accel.testing import assert_close, references


@dataclass(frozen=True)
class Shape:
    """The self-attention of one model: q, k and v are [batch, heads, n, head_dim]."""

    name: str
    batch: int
    heads: int
    n: int
    head_dim: int

    def __post_init__(self) -> None:
        if min(self.batch, self.heads, self.n, self.head_dim) < 1:
            raise ValueError(f"the sizes of a shape are positive, unlike those of {self}")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan1.3b-480p", 1, 12, 32760, 128),
        Shape("wan14b-720p", 1, 40, 75600, 128),
        Shape("hunyuan-720p-129f", 1, 24, 119056, 128),
        Shape("cogvideox-5b", 1, 48, 17776, 64),
        Shape("ltx-512p-121f", 1, 32, 6144, 64),
        Shape("flux-1024", 1, 24, 4608, 128),
        Shape("flux-2048", 1, 24, 16896, 128),
        Shape("cpu-4k", 1, 4, 4096, 64),
        Shape("cpu-8k", 1, 4, 8192, 64),
        Shape("cpu-16k", 1, 4, 16384, 64),
    )
}
OPS = ("block_sparse_attention", "pooled_attention", "rectified_attention")
DEFAULT_SHAPES = {"cpu": ("cpu-4k", "cpu-8k", "cpu-16k"), "cuda": ("wan1.3b-480p", "flux-1024")}


def run_bench(
    op_names: Sequence[str] = OPS,
    shapes: Sequence[str] | None = None,
    keeps: Sequence[float] = (0.1,),
    device: str | None = None,
    out: str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    block: int = 64,
    rounds: int = 5,
    clock: str = "wall",
    echo: Callable[[str], None] = lambda line: None,
) -> list[dict]:
    """One row for each operator, shape and keep; stored as JSON with the machine if `out` is given.

    Args:
        op_names: names in OPS.
        shapes: names in SHAPES (None: a few that suit the device).
        keeps: shares of key blocks, in (0, 1].
        device: "cpu" or "cuda" (None: cuda if there is one).
        dtype: None is float32 on the CPU, bfloat16 elsewhere.
        clock: "wall", or "cpu" for processor time on the CPU (use one thread).
        echo: takes each row as a line of text when it is ready.

    Raises ValueError for an unknown name.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    shapes = shapes or DEFAULT_SHAPES[device]
    for name, known in [(n, OPS) for n in op_names] + [(n, SHAPES) for n in shapes]:
        if name not in known:
            raise ValueError(f"unknown name {name!r}; the benchmark has {', '.join(known)}")
    rows = []
    for shape in (SHAPES[name] for name in shapes):
        for keep in keeps:
            for op in op_names:
                rows.append(_row(op, shape, keep, device, dtype, block, rounds, clock))
                echo(line(rows[-1]))
    if out:
        store(rows, out)
    return rows


def crossover(device: str | None = None, *, rounds: int = 5, clock: str = "wall") -> list[dict]:
    """The shortest of some lengths from which block-sparse attention, map included, beats dense."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    lengths = (256, 512, 768, 1024, 1536, 2048) if device == "cpu" else (1024, 2048, 4096, 8192)
    found = []
    for head_dim in (64, 128):
        for keep in (0.2, 0.1):
            ratios = {}
            for n in lengths:
                shape = Shape(f"n={n}", 1, 4, n, head_dim)
                row = _row(OPS[0], shape, keep, device, dtype, 64, rounds, clock)
                ratios[n] = row["ratio"]
            slower = [n for n, ratio in ratios.items() if ratio is None or ratio <= 1]
            faster = [n for n in lengths if n > max(slower, default=0)]
            found.append(
                {
                    "head_dim": head_dim,
                    "keep": keep,
                    "faster_from": faster[0] if faster else None,
                    "ratios": ratios,
                }
            )
    return found


def _row(
    op: str,
    shape: Shape,
    keep: float,
    device: str,
    dtype: torch.dtype,
    block: int,
    rounds: int,
    clock: str,
) -> dict:
    # Strides are those that diffusers gives: [B, N, H, D] transposed.
    size = (shape.batch, shape.n, shape.heads, shape.head_dim)
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(size, device=device, dtype=dtype, generator=generator).transpose(1, 2)
        for _ in range(3)
    )
    fn = getattr(ops, op)
    table = ops.block_table(q, k, keep, block, block)
    runs = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "map": lambda: ops.block_table(q, k, keep, block, block),
        "attention": lambda: fn(q, k, v, table),
        "ours": lambda: _whole(op, q, k, v, keep, block),
    }
    reasons = {}
    if device == "cuda":
        extra, reasons = baselines.gpu(q, k, v, table)
        runs |= extra
    times = _times(runs, rounds, device, clock)
    density = table.density().item()
    work = 4 * density * shape.batch * shape.heads * shape.n**2 * shape.head_dim
    error, failure = _check(op, q, k, v, table, fn(q, k, v, table))
    return {
        "op": op,
        "shape": asdict(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "implementation": dispatch.select(op, q, block_q=block, block_k=block).name,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "block": block,
        "keep": keep,
        "density": round(density, 4),
        **{f"{name}_ms": ms and round(ms, 3) for name, ms in times.items()},
        **{f"{name}_absent": reason for name, reason in reasons.items()},
        "ratio": None if failure else round(times["dense"] / times["ours"], 2),
        "kept_tflops": round(work / times["attention"] / 1e9, 3),
        "relative_error": error,
        "check": failure or "passed",
    }


def _whole(op: str, q: Tensor, k: Tensor, v: Tensor, keep: float, block: int) -> Tensor:
    """The op with the making of its table, and what it needs of that besides."""
    fn = getattr(ops, op)
    if op not in ("pooled_attention", "rectified_attention"):
        return fn(q, k, v, ops.block_table(q, k, keep, block, block))
    wanted = {"return_means": True, "spreads": op == "rectified_attention"}
    table, means = ops.block_table(q, k, keep, block, block, **wanted)
    return fn(q, k, v, table, means=means)


def _times(
    runs: dict[str, Callable[[], object]], rounds: int, device: str, clock: str
) -> dict[str, float]:
    """Median milliseconds of each run; the runs take turns."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    for run in runs.values():
        run()
    seen = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = now()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seen[name].append(1e3 * (now() - start))
    return {name: statistics.median(values) for name, values in seen.items()}


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, out: Tensor
) -> tuple[float, str | None]:
    """Relative RMS error of a few query blocks of one head, and why the check failed, if it did."""
    reference = getattr(import_module(f"dit_accel.kernels.{op}.reference"), op)
    rows = sorted({0, table.query_blocks // 2, table.query_blocks - 1})
    places = torch.arange(table.n_q, device=q.device)
    here = torch.cat([places[r * table.block_q : (r + 1) * table.block_q] for r in rows])
    indices, counts = table.indices[:1, -1:, rows], table.counts[:1, -1:, rows]
    few = BlockTable(indices, counts, table.block_q, table.block_k, len(here), table.n_k)
    q, k, v, out = q[:1, -1:, here], k[:1, -1:], v[:1, -1:], out[:1, -1:, here]
    wide, same = references(reference, q, k, v, few)
    error = ((out.double() - wide).norm() / wide.double().norm()).item()
    try:
        assert_close(op, out, wide, same)
    except AssertionError as failure:
        return error, str(failure)
    return error, None


def machine() -> dict:
    """What the times depend on."""
    info = {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "triton": import_module("triton").__version__,
        }
    return info


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({os.cpu_count()} cores)"


def store(rows: list[dict], out: str | Path) -> None:
    """Writes the rows with the machine, the versions and the command as JSON."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    record = {"machine": machine(), "command": command, "rows": rows}
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(record, indent=1) + "\n")


def line(row: dict) -> str:
    """A row as one line of text; the ratio is left out if the error check failed."""
    shape = row["shape"]
    size = f"[{shape['batch']},{shape['heads']},{shape['n']},{shape['head_dim']}]"
    ratio = f"{row['ratio']:.2f}x" if row["ratio"] is not None else "check failed"
    others = [
        f"{name} {row[name + '_ms']:.2f}"
        for name in ("cudnn", "flash", "flex")
        if row.get(f"{name}_ms") is not None
    ]
    return (
        f"{row['op']:<24}{shape['name']:<18}{size:<20}kept {row['density']:.3f}  "
        f"dense {row['dense_ms']:.2f} ms  ours {row['ours_ms']:.2f} ms  {ratio}  "
        f"{row['kept_tflops']:.2f} TFLOP/s  error {row['relative_error']:.1e}  {' '.join(others)}"
    ).rstrip()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m dit_accel.bench`; with --e2e that of dit_accel.e2e."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--e2e" in words:
        from dit_accel import e2e

        return e2e.main([word for word in words if word != "--e2e"])
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
    from dit_accel import sweep

    unused = [name for name in ("op", "device", "dtype", "block") if getattr(given, name)]
    unused += ["keep"] * (len(given.keep or ()) > 1)
    if unused:
        parser.error(
            "--sweep times the block-sparse forward in bfloat16 on the GPU, with all blocks and at "
            f"one --keep: leave --{unused[0]} out" + " but once" * (unused[0] == "keep")
        )
    try:
        keep = (given.keep or [0.05])[0]
        sweep.sweep(given.shape or sweep.SHAPES, keep, given.out, echo=print)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
