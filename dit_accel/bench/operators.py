"""Operator benchmarks: map and attention together against dense attention, side by side.

    python -m dit_accel.bench --op pooled_attention --shape wan1.3b-480p --keep 0.05 --out rows.json

A row gives times, TFLOP/s of the kept work and the error; its ratio stands only if the error check
passes. Dense and sparse rounds alternate, so that a busy machine slows both; --clock cpu counts the
processor time of one thread, which other programs hardly disturb.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
from dit_accel.bench import baselines, rivals
from dit_accel.bench.measure import checked, times
from dit_accel.bench.results import line, store
from dit_accel.bench.shapes import DEFAULT_SHAPES, SHAPES, Shape
from dit_accel.ops import dispatch
from dit_accel.table import BlockTable

OPS = ("block_sparse_attention", "pooled_attention", "rectified_attention")


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
    backward: bool = False,
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
        backward: forward and backward of block_sparse_attention are timed, too.
        echo: takes each row as a line of text when it is ready.

    Raises ValueError for an unknown name.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    shapes = shapes or DEFAULT_SHAPES[device]
    check_names(op_names, shapes)
    rows = []
    for shape in (SHAPES[name] for name in shapes):
        for keep in keeps:
            for op in op_names:
                rows.append(_row(op, shape, keep, device, dtype, block, rounds, clock, backward))
                echo(line(rows[-1]))
    if out:
        store(rows, out)
    return rows


def check_names(op_names: Sequence[str], shapes: Sequence[str]) -> None:
    """ValueError for an operator or a shape that the benchmark does not have."""
    for name, known in [(n, OPS) for n in op_names] + [(n, SHAPES) for n in shapes]:
        if name not in known:
            raise ValueError(f"unknown name {name!r}; the benchmark has {', '.join(known)}")


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
    backward: bool = False,
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
    runs: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.scaled_dot_product_attention(q, k, v),
        "map": lambda: ops.block_table(q, k, keep, block, block),
        "attention": lambda: fn(q, k, v, table),
        "ours": lambda: _whole(op, q, k, v, keep, block),
    }
    reasons: dict[str, str] = {}
    if extras(device):
        extra, reasons = baselines.gpu(q, k, v, table)
        runs |= extra
    far = errors(runs, ops.block_sparse_attention(q, k, v, table))
    if backward and op == "block_sparse_attention":
        both, more = _backward(q, k, v, table)
        runs, reasons = runs | both, reasons | more
    took = times(runs, rounds, device, clock)
    best = min((n for n in baselines.DENSE if n in took), key=took.__getitem__)
    density = table.density().item()
    work = 4 * density * shape.batch * shape.heads * shape.n**2 * shape.head_dim
    error, failure = checked(op, q, k, v, table, fn(q, k, v, table))
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
        **{f"{name}_ms": ms and round(ms, 3) for name, ms in took.items()},
        **{f"{name}_absent": reason for name, reason in reasons.items()},
        **{f"{name}_error": error for name, error in far.items()},
        "dense_best": best,
        "ratio": None if failure else round(took[best] / took["ours"], 2),
        "kept_tflops": round(work / took["attention"] / 1e9, 3),
        "relative_error": error,
        "check": failure or "passed",
    }


def extras(device: str) -> bool:
    """Has the device attention of others?"""
    return device == "cuda"


def errors(runs: dict[str, Callable[[], Any]], ours: Tensor) -> dict[str, float]:
    """Relative RMS difference of what others give at the table from what we give."""
    far = {name: runs[name]().float() - ours.float() for name in baselines.SPARSE if name in runs}
    norm = ours.float().norm()
    return {name: float(f"{(x.norm() / norm).item():.2e}") for name, x in far.items()}


def _backward(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Forward and backward at the table, ours and FlashAttention-4's."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def ours() -> object:
        out = ops.block_sparse_attention(q, k, v, table)
        return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    runs: dict[str, Callable[[], object]] = {"ours_both": ours}
    try:
        theirs = rivals.flash4_backward(q, k, v, table)
        theirs()
    except Exception as error:  # the package has its own
        return runs, {"flash4_both": (str(error).splitlines() or [type(error).__name__])[0]}
    return {**runs, "flash4_both": theirs}, {}


def _whole(op: str, q: Tensor, k: Tensor, v: Tensor, keep: float, block: int) -> Tensor:
    """The op with the making of its table, and what it needs of that besides."""
    fn = getattr(ops, op)
    if op not in ("pooled_attention", "rectified_attention"):
        return fn(q, k, v, ops.block_table(q, k, keep, block, block))
    spreads = op == "rectified_attention"
    table, means = ops.block_table(q, k, keep, block, block, return_means=True, spreads=spreads)
    return fn(q, k, v, table, means=means)
