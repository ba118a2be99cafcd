"""Attention in eight bits on a lent GPU: error, time beside the bfloat16 kernel, launch sweep.

    python benchmarks/gpu_int8.py --out int8.json             about a minute on an H100
    python benchmarks/gpu_int8.py --out /tmp/x.json --dry-run   tiny shapes, interpreted

On Hopper the kernel in Gluon is checked and timed beside the plain one. First processes run every
case once, to compile; then the cases run one by one. Each is written as it ends, with its error if
it failed; no case starts after --budget seconds. A time is the median in milliseconds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_run import SHAPES, Plan, Run, random_table, shared
from torch import Tensor

from dit_accel.kernels.block_sparse_attention import reference as exact
from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.int8_attention import gluon as hopper
from dit_accel.kernels.int8_attention import quantize, reference
from dit_accel.kernels.int8_attention import triton as kernel
from dit_accel.kernels.launch import Launch, capability_of, find
from dit_accel.testing import assert_close, repair_interpreter

KEEPS = (0.05, 0.1, 0.25)


def relative(out: Tensor, expected: Tensor) -> float:
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


def inputs(r: Run, batch: int, heads: int, n_q: int, n_k: int, d: int) -> list[Tensor]:
    """Tokens whose keys have a mean, as real ones do."""
    q, k, v = (r.tokens(batch, heads, n, d) for n in (n_q, n_k, n_k))
    return [q, k + 2 * r.tokens(1, heads, 1, d), v]


def rows(r: Run, d: int, block_q: int) -> dict[str, Launch]:
    """The plain launch of a head dimension and block, and those of Hopper's own kernel."""
    capability = capability_of(torch.empty(0, device=r.device))
    found = {"plain": find("int8", capability, d, block_q, specialized=False)}
    if not r.dry and capability == 90 and block_q == 128 and d in (64, 128):
        found |= {f"Hopper, {row.stages} stages": row for row in hopper.CANDIDATES}
    return found


def kernel_of(row: Launch) -> Callable[..., None]:
    """Exactly the kernel that a launch names: `kernel.attend` takes the plain one where it must."""
    return hopper.attend if row.specialized else kernel.attend


def check(
    r: Run, n_q: int, n_k: int, d: int, block_q: int, block_k: int, heads: int = 2
) -> dict[str, Any]:
    """Error against exact attention ≤ 2 × that of the emulation, and what the errors are."""
    q, k, v = inputs(r, 1, heads, n_q, n_k, d)
    table = random_table(r, q, n_k, block_q, block_k, min(0.5, 8192 / n_k))
    wide = exact.block_sparse_attention(q, k, v, table, return_lse=True, dtype=torch.float32)
    same = reference.int8_attention(q, k, v, table, return_lse=True)
    errors = {"emulated": relative(same[0], wide[0])}
    errors["own dtype"] = relative(sparse.block_sparse_attention(q, k, v, table), wide[0])
    found: dict[str, Any] = {"relative_error": errors, "lse_against_emulated": {}}
    for name, row in rows(r, d, block_q).items():
        keys = quantize.quantize(k, v, block_k, min(row.tile, block_k))
        out, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[:3], torch.nan).float()
        kernel_of(row)(q, keys, out, lse, table, row)
        errors[name] = relative(out, wide[0])
        lse_error = found["lse_against_emulated"][name] = (lse - same[1]).abs().max().item()
        assert_close(f"{name}: out, {found}", out, wide[0], same[0])
        assert_close(f"{name}: lse, {found}", lse, wide[1], same[1])
        # a tie rounded the other way moves a logit by one step
        assert lse_error < 2e-2, (name, found)
    return found


def times(
    r: Run, shape: tuple[int, ...], block_q: int, block_k: int, keep: float
) -> dict[str, Any]:
    """Quantisation, attention by each launch, and both together, beside the kernel in the inputs'
    dtype."""
    q, k, v = inputs(r, *shape[:3], *shape[2:])
    table = random_table(r, q, shape[2], block_q, block_k, keep)
    launches, out = rows(r, shape[3], block_q), torch.empty_like(q)
    keys = quantize.quantize(k, v, block_k, min(launches["plain"].tile, block_k))
    ms = {"own dtype": r.ms(lambda: sparse.block_sparse_attention(q, k, v, table))}
    expected, errors = sparse.block_sparse_attention(q, k, v, table), {}
    for name, row in launches.items():
        call = (q, keys, out, None, table, row)
        kernel_of(row)(*call)
        errors[name] = relative(out, expected)
        ms[name] = r.ms(partial(kernel_of(row), *call))
    ms["mean"] = r.ms(lambda: quantize.key_mean(k))
    ms["quantise with mean"] = r.ms(lambda: quantize.quantize(k, v, block_k, 64))
    best = min(ms[name] for name in launches)
    kept = 4e-9 * shape[1] * shape[2] ** 2 * shape[3] * table.density().item()
    return {
        "ms": ms,
        "kept_tflops": {name: kept / ms[name] for name in ("own dtype", *launches)},
        "speedup_attention": ms["own dtype"] / best,
        "speedup_whole": ms["own dtype"] / (best + ms["quantise with mean"]),
        "difference": errors,
    }


def sweep_case(
    r: Run, shape: tuple[int, ...], block_k: int, row: Launch, values: torch.dtype | None
) -> dict[str, Any]:
    """One launch; the result is compared with the kernel in the inputs' dtype."""
    q, k, v = inputs(r, *shape[:3], *shape[2:])
    table = random_table(r, q, shape[2], row.block, block_k, KEEPS[0])
    keys, out = quantize.quantize(k, v, block_k, row.tile, dtype=values), torch.empty_like(q)
    kernel.attend(q, keys, out, None, table, row)
    error = relative(out, sparse.block_sparse_attention(q, k, v, table))
    assert error < 0.1, error
    ms = r.ms(lambda: kernel.attend(q, keys, out, None, table, row))
    kept = 4e-9 * shape[1] * shape[2] ** 2 * shape[3] * table.density().item()
    return {"launch": str(row), "ms": ms, "kept_tflops": kept / ms, "difference": error}


def checks(r: Run) -> Plan:
    kinds = [(128, 64, 64), (128, 128, 64), (64, 64, 64), (80, 128, 128)]
    kinds += [(128, 128, 128), (64, 128, 64), (64, 128, 128)]
    lengths, n = [(1, 1), (63, 65), (1000, 1000), (4096, 4100)], 32760
    if r.dry:
        kinds, lengths, n = kinds[2:], [(65, 150)], 200
    plan: Plan = []
    for kind, (n_q, n_k) in product(kinds, lengths):
        name = f"check {n_q}x{n_k} d{kind[0]} blocks {kind[1]}x{kind[2]}"
        plan.append((name, lambda a=(n_q, n_k, *kind): check(r, *a)))
    plan.append((f"check {n}", lambda: check(r, n, n, 128, 128, 64, 1)))
    return plan


def sweep(r: Run, shape: tuple[int, ...]) -> Plan:
    capability = capability_of(torch.empty(0, device=r.device))
    blocks = [(128, 64, 64, 8), (64, 64, 64, 4), (64, 64, 64, 8), (128, 128, 64, 8)]
    blocks += [(64, 128, 64, 4), (64, 64, 32, 4), (128, 64, 32, 8)]
    choices = list(product(blocks[1:2], (3,)) if r.dry else product(blocks, (3, 2)))
    plan: Plan = []
    for (block_q, block_k, tile, warps), stages in choices:
        row = find("int8", capability, shape[3], block_q, specialized=False)
        row = replace(row, tile=tile, warps=warps, stages=stages, provenance="")
        name = f"sweep {block_q}x{block_k}, tile {tile}, {warps} warps, {stages} stages"
        plan.append((name, lambda a=(block_k, row): sweep_case(r, shape, *a, None)))
    row = find("int8", capability, shape[3], 128, specialized=False)
    name = "weights and values in the inputs' dtype, 128 queries"
    plan.append((name, lambda: sweep_case(r, shape, 64, row, r.dtype)))
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=75, help="seconds")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile first")
    parser.add_argument("--match", default="", help="only cases with this pattern in their name")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, in the interpreter")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.dry_run:
        repair_interpreter()
    r = Run(options.out, options.budget, options.dry_run, once=options.shard is not None)
    shapes = {"tiny": (1, 2, 200, 64)} if r.dry else SHAPES
    large, *plan = reversed(checks(r))
    blocks = [(128, 64, KEEPS), (128, 128, KEEPS), (64, 64, KEEPS[:1])]
    for block_q, block_k, keeps in [(64, 64, KEEPS[:1])] if r.dry else blocks:
        for (name, shape), keep in product(shapes.items(), keeps):
            label = f"times {name} keep {keep} blocks {block_q}x{block_k}"
            plan.append((label, lambda a=(shape, block_q, block_k, keep): times(r, *a)))
    plan += sweep(r, next(iter(shapes.values())))
    plan = [case for case in plan if re.search(options.match, case[0])]
    if options.shard:
        part, parts = map(int, options.shard.split("/"))
        plan = plan[part::parts]
    else:
        if not r.dry:
            shared(__file__, options)
        plan.append(large)
    for name, fn in plan:
        r.case(name, fn)
    failed = [line["case"] for line in r.cases if "error" in line]
    if not options.shard:
        print(f"{len(r.cases)} cases, {len(failed)} failed: {failed}")


if __name__ == "__main__":
    main()
