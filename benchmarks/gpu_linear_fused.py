"""Sparse-linear attention in one kernel on Hopper: checks that may hang apart, then times.

    python benchmarks/gpu_linear_fused.py --out fused.json            90 seconds on an H100
    python benchmarks/gpu_linear_fused.py --out /tmp/x.json --dry-run  without the fused kernel

Each kind of head and blocks is checked in a process of its own, with rows of no block and an output
of NaN; the times are taken in another, in milliseconds. All are killed at their deadline: a
deadlock costs no more. Each case is written as it ends, with its error if it failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_gluon import problem
from gpu_run import SHAPES, Plan, Run
from torch import Tensor

from dit_accel.kernels.block_sparse_attention import gluon
from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.block_table import triton as tables
from dit_accel.kernels.launch import Launch, capability_of, find, run
from dit_accel.kernels.sparse_linear_attention import reference, states
from dit_accel.kernels.sparse_linear_attention import triton as linear
from dit_accel.testing import assert_close, references

LENGTHS = (65, 1000, 4096 + 17, 8200)
# Head dimension, block_q and block_k.
KINDS = tuple(product((128, 64), (128, 64), (64, 128)))
FEATURES = ("softmax", "elu", "relu")
CHECKS, ALL = 50, 88  # seconds
# Tile, warps, stages and programs of the state kernel; the first is the launch table's.
STATES = (
    (64, 8, 2, 256), (64, 8, 2, 132), (64, 8, 3, 132), (128, 8, 2, 132), (64, 16, 3, 132),
    (64, 16, 2, 264), (32, 8, 3, 264), (32, 8, 4, 264), (32, 8, 5, 264), (32, 8, 3, 528),
    (32, 16, 3, 132), (32, 16, 4, 264), (128, 16, 2, 132),
)  # fmt: skip


def row_of(block_q: int) -> Launch:
    """The specialized launch of the forward kernel; for 64 queries the table has another."""
    return next(row for row in gluon.CANDIDATES if row.block == block_q)


def unfused(q: Tensor, k: Tensor, v: Tensor, table: Any, weight: Tensor, *options: Any) -> Tensor:
    """The operator as two kernels and the states."""
    base = sparse.block_sparse_attention(q, k, v, table)
    return linear.linear_branch(base, q, k, v, None, weight, *options, into=base)


def check(r: Run, kind: tuple[int, int, int], n: int, feature_map: str) -> dict[str, Any]:
    """Errors of both forms against the naive one, and the largest difference between them."""
    (d, _, block_k), row = kind, row_of(kind[1])
    q, k, v, table = problem(r, row, n, d, block_k)
    weight, bias = (torch.randn(*s, d, device=r.device) / d**0.5 for s in ((d,), ()))
    if feature_map == "relu":
        q[:, :, :70] = -1.0  # meets no key
    args = (q, k, v, table, weight, bias, feature_map)
    out, two = torch.full_like(q, torch.nan), unfused(*args)
    call = (q, k, v, out, None, table, row, None, None)
    if r.dry:
        out.copy_(two)
    else:
        reason = linear.unfused(*call)
        assert reason is None, reason
        linear.attend(call, weight, bias, feature_map)
    wide, same = references(reference.sparse_linear_attention, *args)
    assert_close("two kernels", two, wide, same)
    assert_close("fused", out, wide, same)
    found = {"fused": out.float() - wide, "unfused": two.float() - wide, "between": out - two}
    return {"largest": {name: x.abs().max().item() for name, x in found.items()}}


def checks(r: Run, kind: tuple[int, int, int]) -> Plan:
    lengths = (65, 200) if r.dry else LENGTHS
    plan: Plan = []
    for feature_map, n in product(FEATURES, lengths):
        label = f"check d{kind[0]} blocks {kind[1]}x{kind[2]} {feature_map} {n}"
        plan.append((label, lambda a=(kind, n, feature_map): check(r, *a)))
    return plan


def times(r: Run, shape: tuple[int, ...], keep: float) -> dict[str, Any]:
    """Parts and the whole operators in both forms, which are compared first."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    weight = torch.randn(shape[3], shape[3], device=r.device) / shape[3] ** 0.5
    table = tables.block_table(q, k, keep, 128, 64)
    row = find("forward", capability_of(q), shape[3], 128)
    one = linear.sparse_linear_attention(q, k, v, table, weight)
    two = unfused(q, k, v, table, weight)
    torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)
    differ = (one - two).abs().max().item()
    call = (q, k, v, one, None, table, row, None, None)
    served = linear.unfused(*call)
    ops = {
        "table": lambda: tables.block_table(q, k, keep, 128, 64),
        "sparse": lambda: sparse.block_sparse_attention(q, k, v, table),
        "states": lambda: linear.projected_state(k, v, weight, "softmax", None),
        "fused": lambda: linear.sparse_linear_attention(q, k, v, table, weight),
        "unfused": lambda: unfused(q, k, v, table, weight),
    }
    if served is None:
        state, total = linear.projected_state(k, v, weight, "softmax", None)
        branch = gluon.Linear(state, total, None, linear.EPS * linear.key_share(k, None), "softmax")
        ops["fused kernel alone"] = lambda: gluon.attend(*call, None, None, branch)
    ms = {name: r.ms(fn) for name, fn in ops.items()}
    whole = {
        "sparse": lambda t: sparse.block_sparse_attention(q, k, v, t),
        "fused": lambda t: linear.sparse_linear_attention(q, k, v, t, weight),
        "unfused": lambda t: unfused(q, k, v, t, weight),
    }
    made = {name: lambda op=op: op(ops["table"]()) for name, op in whole.items()}
    return {
        "ms": ms, "whole_ms": {name: r.ms(fn) for name, fn in made.items()},
        "whole_graph_ms": {name: r.graph_ms(fn) for name, fn in made.items()},
        "not_fused_because": served, "largest_difference": differ,
    }  # fmt: skip


def state_times(r: Run, shape: tuple[int, ...]) -> dict[str, Any]:
    """The state kernel alone, with some launches; TB/s of k and v."""
    k, v = (r.tokens(*shape) for _ in range(2))
    found: dict[str, Any] = {"ms": {}, "tb_per_s": {}}
    for tile, warps, stages, programs in STATES:
        row = find("state", capability_of(k), shape[3], 64)
        row = replace(row, tile=tile, warps=warps, stages=stages)
        tiles = -(-shape[2] // tile)
        span = -(-tiles // max(1, programs // shape[1]))
        spans = -(-tiles // span)
        state = torch.empty(*shape[:2], spans, shape[3] ** 2, device=r.device)
        total = torch.empty(*shape[:2], spans, shape[3], device=r.device)
        case = states.state_case(k, v, state, total, span * tile, row)
        name = f"tile {tile}, {warps} warps, {stages} stages, {spans} spans"
        ms = r.ms(lambda case=case: run(states._linear_state_fwd_kernel, *case))
        found["ms"][name] = ms
        found["tb_per_s"][name] = 2e-9 * k.numel() * k.element_size() / ms
    return found


def timings(r: Run) -> Plan:
    plan: Plan = []
    for name, shape in ({"tiny": (1, 2, 300, 64)} if r.dry else SHAPES).items():
        plan.append((f"times {name} keep 0.05", lambda shape=shape: times(r, shape, 0.05)))
    for name, shape in ({"tiny": (1, 2, 300, 64)} if r.dry else SHAPES).items():
        plan.append((f"states {name}", lambda shape=shape: state_times(r, shape)))
    return plan


def spawn(options: argparse.Namespace, part: str) -> subprocess.Popen:
    command = [sys.executable, __file__, "--out", str(options.out), "--part", part]
    command += ["--dry-run"] if options.dry_run else []
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def gather(r: Run, part: str, child: subprocess.Popen, seconds: float) -> None:
    """Record the lines of a child, and how it ended if that was not well."""
    try:
        output, end = child.communicate(timeout=max(1, seconds))[0], None
    except subprocess.TimeoutExpired:
        child.kill()
        output, end = child.communicate()[0], "killed: out of time"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if end or child.returncode:
        last = lines[-1]["case"] if lines else None
        lines.append({"case": f"process {part}", "error": end or f"exit {child.returncode}"})
        lines[-1]["last"] = last
    for line in lines:
        r.add(line)
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, interpreted")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    r = Run(options.out, ALL, options.dry_run)
    if options.part:
        r.path = options.out.with_suffix(f".{options.part}.part")
        plan = timings(r) if options.part == "times" else checks(r, KINDS[int(options.part)])
        for name, fn in plan:
            r.case(name, fn)
        return r.path.unlink()
    kinds = KINDS[::7] if options.dry_run else KINDS
    began = time.monotonic()
    children = {str(KINDS.index(kind)): spawn(options, str(KINDS.index(kind))) for kind in kinds}
    for part, child in children.items():
        gather(r, part, child, CHECKS - (time.monotonic() - began))
    gather(r, "times", spawn(options, "times"), ALL - (time.monotonic() - began))
    for path in options.out.parent.glob(f"{options.out.stem}.*.part"):
        path.unlink()
    failed = [line["case"] for line in r.cases if "error" in line]
    print(f"{len(r.cases)} cases, {len(failed)} failed: {failed}")


if __name__ == "__main__":
    main()
