"""Launches of the block-sparse forward tried on this GPU: `python -m dit_accel.bench --sweep`.

First processes compile all candidates, into Triton's cache. Then every one is checked against
float32 on a short input and timed on the shape. The fastest of each kind of blocks is printed as
the row to put into kernels/launch.py, with its gain over the row that serves the GPU now.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, fields, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.bench.results import store
from dit_accel.bench.shapes import SHAPES, Shape
from dit_accel.table import BlockTable
from dit_accel.testing import assert_close, references

if TYPE_CHECKING:
    from dit_accel.kernels.launch import Launch


BLOCKS = ((128, 64), (64, 64), (128, 128))
TRIED = ("wan1.3b-480p", "cogvideox-5b")  # heads of 128 and of 64
_CHECKED = 1000  # tokens
_LAZY = 8.0  # FlashAttention-4's: weights of at most 256 fit float16
_WORKERS = 16  # processes that compile, at most


def sweep(
    shapes: Sequence[str] = TRIED,
    keep: float = 0.05,
    out: str | Path | None = None,
    *,
    device: str = "cuda",
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    limit: int | None = None,
    echo: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """One row for each shape, pair of blocks and candidate: milliseconds, or why there are none.

    limit: only so many candidates of each. `out` is rewritten after each pair of blocks. Raises
    ValueError where there is no GPU, RuntimeError when not one launch gives the right result.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("a sweep times the Triton kernels: it needs an NVIDIA GPU")
    from dit_accel.kernels.launch import capability_of, find

    todo, capability = [], capability_of(torch.empty(0, device=device))
    for name, (block_q, block_k) in product(shapes, blocks):
        now = find("forward", capability, SHAPES[name].head_dim, block_q)
        others = candidates(now, SHAPES[name].head_dim, block_k)
        tried = [now, *(c for c in others if c != now)][:limit]
        todo.append((name, block_q, block_k, tried))
    if device == "cuda":
        jobs = [(name, block_k, launch) for name, _, block_k, tried in todo for launch in tried]
        _compile(jobs)
        echo(f"{len(jobs)} launches compiled")
    rows: list[dict[str, Any]] = []
    for name, block_q, block_k, tried in todo:
        shape = SHAPES[name]
        q, k, v = _tokens(shape, shape.n, device)
        table = ops.block_table(q, k, keep, block_q, block_k)
        work = 4e-9 * q[..., 0].numel() * shape.n * shape.head_dim * table.density().item()
        known = _known(shape, block_q, block_k, device)
        part: list[dict[str, Any]] = []
        for launch in tried:
            row: dict[str, Any] = {"shape": name, "blocks": [block_q, block_k]}
            row |= {"launch": asdict(launch), "serves_now": launch is tried[0]}
            row |= _try(launch, known, q, k, v, table, work)
            part.append(row)
            echo(_line(row))
        rows += part
        echo(_verdict(part))
        if out is not None:
            store(rows, out)
    return rows


def candidates(now: Launch, head_dim: int, block_k: int) -> Iterator[Launch]:
    """Launches like `now` with other tiles, warps, stages and loads; Hopper's own kernel too, and
    the plain one with lazy rescaling."""
    from dit_accel.kernels.launch import find

    tma = (True, False) if now.capability >= 90 and head_dim in (64, 128) else (False,)
    plain = replace(
        now, head_dim=head_dim, specialized=False, pairs=False, counter=False,
        provenance="a candidate",
    )  # fmt: skip
    for tile, warps, stages, loads in product((64, 32, 128, 16), (4, 8), (2, 3, 4), tma):
        if tile <= block_k:
            yield replace(plain, tile=tile, warps=warps, stages=stages, descriptors=loads)
    always = find("forward", now.capability, head_dim, now.block, specialized=False)
    yield replace(always, head_dim=head_dim, lazy=_LAZY, provenance="a candidate")
    if now.capability == 90:
        from dit_accel.kernels.block_sparse_attention.gluon import CANDIDATES

        for launch in CANDIDATES:
            if launch.block == now.block and (launch.pairs or launch.tile <= block_k):
                yield replace(launch, head_dim=head_dim)


def _compile(jobs: Sequence[tuple[str, int, Launch]]) -> None:
    """Compile launches, each for a shape and a key block, in processes of their own."""
    workers = min(_WORKERS, os.cpu_count() or 1, len(jobs))
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    with pool, suppress(BrokenProcessPool):  # an aborting compiler costs the others a later start
        list(pool.map(_compile_one, jobs))


def _compile_one(job: tuple[str, int, Launch]) -> None:
    """Run a launch once on a short input; what is wrong with it is told when it is tried."""
    name, block_k, launch = job
    shape = SHAPES[name]
    short = Shape("short", shape.batch, shape.heads, 2 * launch.block, shape.head_dim)
    q, k, v = _tokens(short, short.n, "cuda")
    table = ops.block_table(q, k, 0.5, launch.block, block_k)
    with suppress(Exception):
        _attend(launch, q, k, v, torch.empty_like(q), table)


def _try(
    launch: Launch, known: tuple, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, work: float
) -> dict[str, object]:
    from triton.errors import TritonError

    try:
        _check(launch, *known)
        out = torch.empty_like(q)
        ms = _median(lambda: _attend(launch, q, k, v, out, table))
    except (TritonError, RuntimeError, AssertionError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
    return {"ms": ms, "kept_tflops": work / ms}


def _attend(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, out: Tensor, table: BlockTable
) -> Tensor:
    """Exactly this launch; ValueError where it does not serve the call."""
    from dit_accel.kernels.block_sparse_attention import triton as kernel

    if launch.specialized:
        from dit_accel.kernels.block_sparse_attention import gluon

        why = gluon.unserved(q, k, v, out, None, table, launch)
        if why is not None:
            raise ValueError(why)
    kernel.attend(q, k, v, out, None, table, launch)
    return out


def _known(shape: Shape, block_q: int, block_k: int, device: str) -> tuple:
    """A short input of this head dimension, its table, and what is right in float32 and in its own
    dtype."""
    from dit_accel.kernels.block_sparse_attention import reference

    n = min(_CHECKED, shape.n)
    q, k, v = _tokens(Shape("check", 1, 2, n, shape.head_dim), n, device)
    short = ops.block_table(q, k, 0.5, block_q, block_k)
    return q, k, v, short, references(reference.block_sparse_attention, q, k, v, short)


def _check(
    launch: Launch, q: Tensor, k: Tensor, v: Tensor, short: BlockTable, right: tuple[Tensor, Tensor]
) -> None:
    """AssertionError unless the launch gives what is right."""
    poisoned = torch.full_like(q, float("nan"))
    assert_close("forward", _attend(launch, q, k, v, poisoned, short), *right)


def _tokens(shape: Shape, n: int, device: str) -> Iterator[Tensor]:
    """q, k and v [B, H, n, D] as diffusers gives them."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    size = (shape.batch, n, shape.heads, shape.head_dim)
    return (torch.randn(size, device=device, dtype=dtype).transpose(1, 2) for _ in range(3))


def _median(fn: Callable[[], object]) -> float:
    """Median milliseconds; one call where there is no GPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(fn, warmup=30, rep=150, return_mode="median")
    began = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - began)


def _written(launch: dict[str, object]) -> str:
    """The launch as a row of kernels/launch.py."""
    from dit_accel.kernels.launch import Launch

    defaults = {f.name: f.default for f in fields(Launch)}
    first = ("op", "capability", "head_dim", "block", "tile", "warps", "stages")
    given = [repr(launch[name]) for name in first]
    rest = ("descriptors", "specialized", "pairs", "counter", "precision", "bits", "lazy")
    given += [f"{n}={launch[n]!r}" for n in rest if launch[n] != defaults[n]]
    return f"Launch({', '.join(given)})"


def _line(row: dict[str, Any]) -> str:
    block_q, block_k = row["blocks"]
    found = row.get("error") or f"{row['ms']:.3f} ms, {row['kept_tflops']:.0f} TFLOP/s"
    return f"{row['shape']} {block_q}x{block_k} {_written(row['launch'])}: {found}"


def _verdict(rows: list[dict[str, Any]]) -> str:
    timed = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    if not timed:
        raise RuntimeError(f"no launch gives the right result: {rows[0]['error']}")
    best, now = timed[0], next((row for row in timed if row["serves_now"]), None)
    gain = f"{now['ms'] / best['ms']:.2f}× the row in use" if now else "the row in use fails"
    return f"fastest: {_written(best['launch'])}, {gain}"
