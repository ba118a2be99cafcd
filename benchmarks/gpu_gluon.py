"""The Hopper kernel of block-sparse attention: checks that may hang apart, then times.

    python benchmarks/gpu_gluon.py --out gluon.json             two minutes on an H100
    python benchmarks/gpu_gluon.py --out gluon.json --match "64x64|pairs"   some candidates
    python benchmarks/gpu_gluon.py --out /tmp/x.json --dry-run   compiles only, without a GPU

First processes compile every case. Then each candidate is checked in a process of its own, which is
killed after a minute: a deadlock costs no more. At last those that passed are timed beside the
plain kernel, in turns, in milliseconds and TFLOP/s of the kept work. Each case is written as it
ends, with its error if it failed; no time starts after --budget seconds. A candidate with a counter
takes its rows from it at every table, as if that was uneven; in the checks however few there are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # a dry run compiles

import torch
from gpu_run import SHAPES, Plan, Run, random_table
from torch import Tensor

from dit_accel.kernels.aot_cases import compile_row
from dit_accel.kernels.block_sparse_attention import gluon, reference
from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.launch import Launch, capability_of, find
from dit_accel.kernels.pooled_attention import reference as pooled_reference
from dit_accel.kernels.pooled_attention import triton as pooled
from dit_accel.kernels.rectified_attention import triton as rectified
from dit_accel.kernels.sparse_linear_attention import reference as linear
from dit_accel.kernels.sparse_linear_attention.features import EPS, features
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import assert_close, references

LENGTHS = (1, 63, 64, 65, 1000, 4100)
FEW = (65, 1000)
KINDS = tuple(product((128, 64), (128, 64)))
WIDTHS = SHAPES | {"flux-1024": (1, 24, 4608, 128), "cogvideox-5b": (1, 48, 17776, 64)}
EXTRAS = {"": LENGTHS, "kv_len": LENGTHS, "pool": FEW, "rectify": FEW, "linear": FEW}
SECONDS = 60
UNEQUAL = {"unequal heads": (0.8, 0.0), "unequal rows": (0.8, 0.6)}


def name_of(row: Launch) -> str:
    more = [name for name in ("pairs", "counter") if getattr(row, name)]
    return ", ".join([f"{row.block}x{row.tile}, {row.stages} stages", *more])


def kinds(row: Launch) -> list[tuple[int, int]]:
    """Head dimensions and key blocks; a tile of 128 is for blocks of 128, or for pairs of 64."""
    return [kind for kind in KINDS if row.pairs or kind[1] >= row.tile]


def problem(r: Run, row: Launch, n: int, d: int, block_k: int) -> tuple[Tensor, ...]:
    """q, k, v and a table with rows of no block, of one and of two."""
    q, k, v = (r.tokens(1, 2, n, d) for _ in range(3))
    table = random_table(r, q, n, row.block, block_k, 0.5)
    for i in range(min(3, table.counts.shape[2])):
        table.counts[0, 0, i] = min(i, int(table.counts[0, 0, i]))
    return q, k, v, replace(table, uneven=True)


def call_of(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, row: Launch, extra: str
) -> tuple[tuple[Any, ...], Any]:
    """The arguments of `forward`, and what a reference takes beside q."""
    out, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[:3], torch.nan).float()
    kv_len = q.shape[2] // 2 + 1 if extra == "kv_len" else None
    if kv_len is not None:
        k[:, :, kv_len:], v[:, :, kv_len:] = torch.nan, torch.nan
    pool = pooled.pooled_keys(k, v, table, None, 128) if extra == "pool" else None
    pair = rectified.coefficients(q, k, v, table) if extra == "rectify" else None
    branch = None
    if extra == "linear":
        # of a weight that is the identity
        fk, n, lse = features(k.float(), "softmax"), k.shape[2], None
        state, total = (fk.mT @ v.float() / n).to(q.dtype), fk.sum(2) / n
        branch = gluon.Linear(state, total, None, EPS / n, "softmax")
    return (q, k, v, out, lse, table, row, None, kv_len, pool, pair, branch), kv_len


def attend_plainly(call: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Output and LSE of the plain kernel for the arguments of `forward`."""
    q, k, v, out, lse, table = call[:6]
    outs = torch.empty_like(out), torch.empty_like(lse)
    row = find("forward", capability_of(q), q.shape[-1], table.block_q, specialized=False)
    sparse.attend(q, k, v, *outs, table, row, *call[7:11])
    return outs


def check(r: Run, row: Launch, n: int, d: int, block_k: int, extra: str) -> dict[str, Any]:
    """Error against the naive attention; that of r·O + C against the plain kernel's."""
    q, k, v, table = problem(r, row, n, d, block_k)
    call, kv_len = call_of(q, k, v, table, row, extra)
    reason = gluon.unserved(*call)
    assert reason is None, reason
    gluon.attend(*call)
    out, lse = call[3:5]
    if extra == "rectify":
        plain = attend_plainly(call)
        torch.testing.assert_close(out, plain[0], atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse, plain[1], atol=1e-3, rtol=1e-3)
        return {"largest": (out - plain[0]).abs().max().item()}
    if extra == "linear":
        weight = torch.eye(d, device=r.device, dtype=q.dtype)
        wide, same = references(linear.sparse_linear_attention, q, k, v, table, weight)
        assert_close("out", out, wide, same)
        return {"largest": (out.float() - wide).abs().max().item()}
    naive = pooled_reference.pooled_attention if extra == "pool" else None
    naive = naive or reference.block_sparse_attention
    options = {"kv_len": kv_len, "return_lse": True}
    wide, same = references(naive, q, k, v, table, **options)
    assert_close("out", out, wide[0], same[0])
    assert_close("lse", lse, wide[1], same[1].float())
    return {"largest": (out.float() - wide[0]).abs().max().item()}


def checks(r: Run, row: Launch) -> Plan:
    plan: Plan = []
    for (d, block_k), (extra, lengths) in product(kinds(row), EXTRAS.items()):
        for n in lengths:
            label = f"check {name_of(row)}: d{d} block_k {block_k} {extra} {n}"
            plan.append((label, lambda a=(n, d, block_k, extra): check(r, row, *a)))
    return plan


def compile_cases(r: Run, row: Launch, kind: tuple[int, int]) -> None:
    """Compile the kernel without a launch, and what it is compared with."""
    d, block_k = kind
    kernel = gluon._block_sparse_attention_hopper_fwd_kernel
    for extra in EXTRAS:
        call, _ = call_of(*problem(r, row, 300, d, block_k), row, extra)
        grid, arguments, _ = gluon.forward(*call)
        options = {"num_warps": row.warps, "num_stages": row.stages, "enable_fp_fusion": False}
        kernel.warmup(**arguments, **options, grid=grid)
        if extra in ("", "rectify"):
            attend_plainly(call)


def unequal_table(
    q: Tensor, block_q: int, block_k: int, keep: float, heads: float, rows: float
) -> BlockTable:
    """Random blocks, as many as log-normal shares of heads and of rows say: the σ of each."""
    (b, h, n, _), sizes = q.shape, (block_q, block_k)
    m_q, m_k = (block_count(n, size) for size in sizes)
    each = torch.randn(b, h, 1, 1, device=q.device) * heads
    each = each + torch.randn(b, h, m_q, 1, device=q.device) * rows
    shares = (each - (heads**2 + rows**2) / 2).exp() * keep
    kept = torch.rand(b, h, m_q, m_k, device=q.device) < shares
    return BlockTable.from_mask(kept, *sizes, n, n)


def times(
    r: Run, shape: tuple[int, ...], keep: float, block_q: int, block_k: int, rows: list[Launch],
    unequal: tuple[float, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The plain kernel and the candidates at one table, in turns; results are compared first."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    if unequal is None:
        table = random_table(r, q, shape[2], block_q, block_k, keep)
    else:
        table = unequal_table(q, block_q, block_k, keep, *unequal)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=r.device)
    plain = find("forward", capability_of(q), shape[3], block_q, specialized=False)
    kept = 4e-9 * shape[1] * shape[2] ** 2 * shape[3] * table.density().item()
    call = (q, k, v, out, lse, replace(table, uneven=True))
    sparse.attend(*call, plain)
    expected = out.clone()
    for row in rows:
        out.fill_(torch.nan)
        gluon.attend(*call, row)
        torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    fns = {name_of(row): lambda row=row: gluon.attend(*call, row) for row in rows}
    ms = r.in_turns({"plain": lambda: sparse.attend(*call, plain), **fns})
    return {"ms": ms, "kept_tflops": {name: kept / x for name, x in ms.items()}}


def timings(r: Run, passed: list[Launch]) -> Plan:
    plan: Plan = []
    for (name, shape), keep in product(WIDTHS.items(), (0.05, 0.1)):
        for block_q, block_k in ((128, 128), (128, 64), (64, 64), (64, 128)):
            rows = [x for x in passed if x.block == block_q and (x.pairs or x.tile <= block_k)]
            if not rows:
                continue
            label = f"times {name} keep {keep} blocks {block_q}x{block_k}"
            plan.append((label, lambda a=(shape, keep, block_q, block_k, rows): times(r, *a)))
            if name in SHAPES and keep == 0.05:
                for what, sigmas in UNEQUAL.items():
                    a = (shape, keep, block_q, block_k, rows, sigmas)
                    plan.append((f"{label}, {what}", lambda a=a: times(r, *a)))
    return plan


def spawn(options: argparse.Namespace, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--out", str(options.out), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wanted(options: argparse.Namespace) -> list[tuple[int, Launch]]:
    """The candidates of --match, with their numbers."""
    rows = enumerate(gluon.CANDIDATES)
    return [(i, row) for i, row in rows if re.search(options.match, name_of(row))]


def apart(r: Run, options: argparse.Namespace) -> list[Launch]:
    """Check every candidate in its own process; those that passed whole."""
    children = [(row, spawn(options, "--check", str(i))) for i, row in wanted(options)]
    passed, deadline = [], time.monotonic() + SECONDS
    for row, child in children:
        try:
            output = child.communicate(timeout=max(1, deadline - time.monotonic()))[0]
            end = f"exit {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, end = child.communicate()[0], f"killed after {SECONDS} s"
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        failed = [line for line in lines if "error" in line]
        whole = end == "exit 0" and len(lines) == len(checks(r, row))
        worst = max((line["largest"] for line in lines if "largest" in line), default=None)
        r.add({"case": f"checks {name_of(row)}", "passed": len(lines) - len(failed),
               "of": len(checks(r, row)), "failed": failed[:5], "end": end,
               "last": lines[-1]["case"] if lines else None, "largest_error": worst})  # fmt: skip
        print(json.dumps(r.cases[-1]), flush=True)
        if whole and not failed:
            passed.append(row)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=150, help="seconds")
    parser.add_argument("--dry-run", action="store_true", help="compile ahead of time only")
    parser.add_argument("--match", default="", help="a part of the candidates' names")
    parser.add_argument("--check", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    r = Run(options.out, options.budget, options.dry_run)
    if options.dry_run:
        for _, row in wanted(options):
            r.case(f"compile {name_of(row)}", lambda row=row: vars(compile_row(row)))
        return
    if options.compile or options.check is not None:
        gluon.COUNTED = 0
    if options.compile:
        row, kind = map(int, options.compile.split("/"))
        return compile_cases(r, gluon.CANDIDATES[row], kinds(gluon.CANDIDATES[row])[kind])
    if options.check is not None:
        r.path = options.out.with_suffix(f".check{options.check}")
        for name, fn in checks(r, gluon.CANDIDATES[options.check]):
            r.case(name, fn)
        return r.path.unlink()
    pairs = [(i, j) for i, row in wanted(options) for j in range(len(kinds(row)))]
    for child in [spawn(options, "--compile", f"{i}/{j}") for i, j in pairs]:
        child.communicate()
    for name, fn in timings(r, apart(r, options)):
        r.case(name, fn)
    failed = [line["case"] for line in r.cases if line.get("failed") or "error" in line]
    print(f"{len(r.cases)} cases, {len(failed)} failed: {failed}")


if __name__ == "__main__":
    main()
