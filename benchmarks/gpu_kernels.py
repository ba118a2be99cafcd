r"""One run on a lent GPU: correctness in bfloat16, times against dense attention, launch sweep.

    python benchmarks/gpu_kernels.py --out results.json            minutes on an H100
    python benchmarks/gpu_kernels.py --out /tmp/x.json --dry-run   tiny shapes, interpreted

First --workers processes share all cases: they check, and compile what will be timed. Then the
times are taken, alone on the GPU. Each case is written as it ends, with its error if it failed; no
case starts after --budget seconds. A time is the median in milliseconds, and counts only beside the
check of the same kernel. --single: Hopper's kernel takes key blocks of 64 one by one, not in pairs.
Memory errors and races, on a few shapes:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes all --tool memcheck \
        python benchmarks/gpu_kernels.py --out /tmp/x.json --part checks --workers 1 --match 63x65
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from gpu_checks import checks
from gpu_run import SHAPES, Plan, Run, random_table, shared
from gpu_sweeps import (
    coefficient_times,
    score_times,
    state_times,
    sweep,
    sweep_backward,
    table_times,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel import ops as public
from dit_accel.kernels import launch
from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.block_table import triton as tables
from dit_accel.kernels.block_table.means import block_means, query_key_means
from dit_accel.kernels.block_table.pool import kept_bits, pooled_blocks
from dit_accel.kernels.block_table.transpose import transpose_table
from dit_accel.kernels.pooled_attention import triton as pooled
from dit_accel.kernels.rectified_attention import triton as rectified
from dit_accel.kernels.sparse_linear_attention import states
from dit_accel.kernels.sparse_linear_attention import triton as linear
from dit_accel.kernels.window_attention import triton as window
from dit_accel.ops import dispatch

KEEPS = (0.05, 0.02, 0.1, 0.15, 0.25, 0.5)


def roofs(r: Run) -> dict[str, Any]:
    """TFLOP/s of a square product, TB/s of a copy."""
    n = 64 if r.dry else 8192
    a, b = (torch.randn(n, n, device=r.device, dtype=r.dtype) for _ in range(2))
    big = torch.randn(n, n, 8, device=r.device)
    to = torch.empty_like(big)
    return {
        "tflops": 2e-9 * n**3 / r.ms(lambda: a @ b),
        "tb_per_s": 2e-9 * big.numel() * 4 / r.ms(lambda: to.copy_(big)),
    }


def operators(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Operators of a table and, some of them, of the means that its maker returns."""
    weight = torch.randn(q.shape[3], q.shape[3], device=q.device) / q.shape[3] ** 0.5
    return {
        "sparse": lambda t: sparse.block_sparse_attention(q, k, v, t),
        "pooled": lambda t, m=None: pooled.pooled_attention(q, k, v, t, k_mean=m and m.k),
        "rectified": lambda t, m=None: rectified.rectified_attention(q, k, v, t, means=m),
        "sla": lambda t: linear.sparse_linear_attention(q, k, v, t, weight),
        "sla rest": lambda t: linear.sparse_linear_attention(q, k, v, t, weight, excluded=t),
    }


def whole_operators(
    q: Tensor, k: Tensor, v: Tensor, keep: float, block_q: int
) -> dict[str, Callable[[], Tensor]]:
    """The same with the table in them."""
    means = {"pooled": {"return_means": True}}
    means["rectified"] = means["pooled"] | {"spreads": True}

    def call(name: str, op: Callable[..., Tensor]) -> Tensor:
        made = tables.block_table(q, k, keep, block_q, 64, **means.get(name, {}))
        return op(*made) if name in means else op(made)

    return {name: partial(call, name, op) for name, op in operators(q, k, v).items()}


def times(r: Run, shape: tuple[int, ...], keep: float, block_q: int) -> dict[str, Any]:
    """Parts, then whole operators (the table in them), launched one by one and as a CUDA graph."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    table = tables.block_table(q, k, keep, block_q, 64)
    kept = 4e-9 * q.shape[1] * shape[2] ** 2 * shape[3] * table.density().item()
    ops, all_of_it = operators(q, k, v), whole_operators(q, k, v, keep, block_q)
    ms = {"table": r.ms(lambda: tables.block_table(q, k, keep, block_q, 64))}
    ms |= {name: r.ms(lambda op=op: op(table)) for name, op in ops.items()}
    extra = {name: r.peak(call) for name, call in all_of_it.items()}
    whole = {name: r.ms(call) for name, call in all_of_it.items()}
    graph = {name: r.graph_ms(call) for name, call in all_of_it.items()}
    return {"ms": ms, "whole_ms": whole, "whole_graph_ms": graph,
            "kept_tflops": kept / ms["sparse"], "peak_bytes": extra,
            "inputs_bytes": 3 * q.numel() * q.element_size()}  # fmt: skip


def launch_times(r: Run) -> dict[str, Any]:
    """Microseconds of Python for one call: the GPU's work is too short to hide any."""
    n, calls = (200, 2) if r.dry else (256, 300)
    q, k, v = (r.tokens(1, 2, n, 64) for _ in range(3))
    table = tables.block_table(q, k, 0.5)
    found = {}
    for name, fn in {
        "table": lambda: tables.block_table(q, k, 0.5),
        "sparse": lambda: sparse.block_sparse_attention(q, k, v, table),
        "pooled": lambda: pooled.pooled_attention(q, k, v, table),
        "rectified": lambda: rectified.rectified_attention(q, k, v, table),
    }.items():
        fn()
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        found[name] = round(1e6 * (time.perf_counter() - began) / calls, 1)
    return {"us": found}


def dense_times(r: Run, shape: tuple[int, ...]) -> dict[str, Any]:
    q, k, v = (r.tokens(*shape) for _ in range(3))
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "fa2": SDPBackend.FLASH_ATTENTION}
    ms = {}
    for name, backend in ({"math": SDPBackend.MATH} if r.dry else backends).items():
        with sdpa_kernel(backend):
            ms[name] = r.ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    return {"ms": ms}


def flex_time(r: Run, shape: tuple[int, ...], keep: float) -> dict[str, Any]:
    """FlexAttention at the same table, 128 × 128 blocks, beside our kernel."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = (r.tokens(*shape) for _ in range(3))
    n = shape[2] // 128 * 128
    q, k, v = q[:, :, :n], k[:, :, :n], v[:, :, :n]
    table = random_table(r, q, n, 128, 128, keep)
    full = torch.zeros(*table.counts.shape, n // 128, dtype=torch.int32, device=r.device)
    full[..., : table.indices.shape[-1]] = table.indices
    none = torch.zeros_like(table.counts)
    mask = BlockMask.from_kv_blocks(none, full, table.counts, full, BLOCK_SIZE=128)
    compiled = flex_attention if r.dry else torch.compile(flex_attention)
    out = compiled(q, k, v, block_mask=mask)
    ours = sparse.block_sparse_attention(q, k, v, table)
    torch.testing.assert_close(out.float(), ours.float(), atol=2e-2, rtol=2e-2)
    ms = {"flex": r.ms(lambda: compiled(q, k, v, block_mask=mask))}
    ms["ours"] = r.ms(lambda: sparse.block_sparse_attention(q, k, v, table))
    return {"ms": ms}


def map_times(r: Run, shape: tuple[int, ...], keep: float, block_q: int) -> dict[str, Any]:
    """The parts of the table, and what the compensations add to it."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    options = {"return_means": True, "spreads": True}
    table, means = tables.block_table(q, k, keep, block_q, 64, **options)
    ms = {
        "mean q": r.ms(lambda: block_means(q, block_q)),
        "mean k": r.ms(lambda: block_means(k, 64)),
        "means q, k": r.ms(lambda: query_key_means(q, k, block_q, 64)),
        "means q, k, spread": r.ms(lambda: query_key_means(q, k, block_q, 64, spread=True)),
        "means k, v": r.ms(lambda: pooled_blocks(k, v, 64)),
        "means v": r.ms(lambda: pooled_blocks(k, v, 64, known=means.k)),
        "coefficients": r.ms(lambda: rectified.coefficients(q, k, v, table)),
        "coefficients, means known": r.ms(
            lambda: rectified.coefficients(q, k, v, table, means=means)
        ),
        "kept bits": r.ms(lambda: kept_bits(replace(table, bits=None))),
        "transpose": r.ms(lambda: transpose_table(table)),
        "all": r.ms(lambda: tables.block_table(q, k, keep, block_q, 64)),
    }
    memory = tables._SCORE_BYTES
    for bits in (23, 24, 26, 27):
        tables._SCORE_BYTES = 2**bits
        ms[f"all, scores of {2**bits} bytes"] = r.ms(
            lambda: tables.block_table(q, k, keep, block_q, 64)
        )
    tables._SCORE_BYTES = memory
    return {"ms": ms}


def kernel_times(r: Run, shape: tuple[int, ...], keep: float, block_q: int) -> dict[str, Any]:
    """Microseconds of each kernel of a whole operator."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    calls = whole_operators(q, k, v, keep, block_q)
    return {"us": {name: r.kernels(fn) for name, fn in calls.items()}}


def linear_times(r: Run, shape: tuple[int, ...], keep: float, block_q: int) -> dict[str, Any]:
    """The linear branch alone, over all keys and without the table's blocks, and its gradients."""
    base, q, k, v = (r.tokens(*shape) for _ in range(4))
    table = tables.block_table(q, k, keep, block_q, 64)
    weight = torch.randn(shape[3], shape[3], device=r.device) / shape[3] ** 0.5
    found: dict[str, Any] = {"ms": {}, "peak_bytes": {}}
    for name, excluded in (("all", None), ("rest", table)):
        for fn in (linear.linear_branch, linear.linear_branch_backward):
            call = partial(fn, base, q, k, v, excluded, weight)
            found["ms"][f"{name} {fn.__name__}"] = r.ms(call)
            found["peak_bytes"][f"{name} {fn.__name__}"] = r.peak(call)
    worst = tables.block_table(-q, k, 0.1, block_q, 64)
    found["ms"]["union of two tables"] = r.ms(lambda: table.union(worst))
    memory, call = states._MEMORY, partial(linear.linear_branch, base, q, k, v, table, weight)
    for bits in (25, 27, 28):
        states._MEMORY = 2**bits
        found["ms"][f"rest linear_branch, states of {2**bits} bytes"] = r.ms(call)
    states._MEMORY = memory
    return found | {"inputs_bytes": 3 * q.numel() * q.element_size()}


def other_times(r: Run, shape: tuple[int, ...], keep: float, block_q: int) -> dict[str, Any]:
    """A full step of Re-ttention."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    table = tables.block_table(q, k, keep, block_q, 64)
    return {"ms": {"window full step": r.ms(lambda: window.window_attention(q, k, v, table))}}


def gradient_times(r: Run, shape: tuple[int, ...], keep: float, block_q: int) -> dict[str, Any]:
    """Forward and backward of the operators that train, at the table that q and k choose: key
    blocks differ in how many rows keep them, unlike those of a random table."""
    q, k, v, grad = (r.tokens(*shape) for _ in range(4))
    weight = torch.randn(shape[3], shape[3], device=r.device) / shape[3] ** 0.5
    leaves = [x.requires_grad_() for x in (q, k, v, weight)]
    found: dict[str, Any] = {"ms": {}}
    with dispatch.recording() as used:
        table = public.block_table(q.detach(), k.detach(), keep, block_q, 64)
        calls = {
            "sparse": lambda: public.block_sparse_attention(q, k, v, table),
            "pooled": lambda: public.pooled_attention(q, k, v, table),
            "sla": lambda: public.sparse_linear_attention(q, k, v, table, weight),
        }
        for name, call in calls.items():
            out = call()
            needed = leaves if name == "sla" else leaves[:3]
            both = {"forward": call}
            both["backward"] = partial(torch.autograd.grad, out, needed, grad, retain_graph=True)
            for part, fn in both.items():
                found["ms"][f"{name} {part}"] = r.ms(fn)
    rows = transpose_table(table)[1]
    longest, mean = rows.max().item(), rows.float().mean().item()
    return found | {"rows_of_a_key_block": [longest, mean], "implementations": sorted(set(used))}


def scaling(r: Run, n: int) -> dict[str, Any]:
    """Whole operators at one length, 12 heads of 128: a tenth of the blocks, 64 of them, all of
    them (cuDNN); milliseconds and the bytes that a call allocates, its result included."""
    q, k, v = (r.tokens(1, 12, n, 128) for _ in range(3))
    weight = torch.randn(128, 128, device=r.device) / 128**0.5
    ops = {
        "sparse": sparse.block_sparse_attention,
        "pooled": pooled.pooled_attention,
        "rectified": rectified.rectified_attention,
        "sla": lambda q, k, v, t: linear.sparse_linear_attention(q, k, v, t, weight),
    }
    keeps = {"a tenth": 0.1, "64 blocks": min(1.0, 4096 / n)}
    ms, peak = {}, {}
    for (name, op), (kept, keep) in product(ops.items(), keeps.items()):

        def whole(op: Callable[..., Tensor] = op, keep: float = keep) -> Tensor:
            return op(q, k, v, tables.block_table(q, k, keep, 128, 64))

        ms[f"{name}, {kept}"] = r.ms(whole)
        peak[f"{name}, {kept}"] = r.peak(whole)
    if not r.dry:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            ms["cudnn"] = r.ms(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    return {"ms": ms, "peak_bytes": peak, "inputs_bytes": 3 * q.numel() * q.element_size(), "n": n}


def timings(r: Run) -> Plan:
    """What is timed, the most telling first."""
    shapes = {"tiny": (1, 2, 200, 64)} if r.dry else SHAPES
    first = next(iter(shapes.values()))
    plan: Plan = [("roofs", lambda: roofs(r)), ("launches", lambda: launch_times(r))]
    for name, shape in shapes.items():
        plan.append((f"dense {name}", lambda s=shape: dense_times(r, s)))
        for block_q in (64, 128):
            label = f"{name} keep 0.05 block_q {block_q}"
            plan.append((f"times {label}", lambda a=(shape, 0.05, block_q): times(r, *a)))
            plan.append((f"map {label}", lambda a=(shape, 0.05, block_q): map_times(r, *a)))
            plan.append((f"kernels {label}", lambda a=(shape, 0.05, block_q): kernel_times(r, *a)))
            plan.append((f"linear {label}", lambda a=(shape, 0.05, block_q): linear_times(r, *a)))
            fn = gradient_times
            plan.append((f"gradients {label}", lambda f=fn, a=(shape, 0.05, block_q): f(r, *a)))
            if shape[2] < 40000:
                plan.append((f"other {label}", lambda a=(shape, 0.05, block_q): other_times(r, *a)))
    for name, shape in shapes.items():
        plan.append((f"sweep coefficients {name}", lambda s=shape: coefficient_times(r, s, 128)))
        plan.append((f"sweep scores {name}", lambda s=shape: score_times(r, s, 128)))
        plan.append((f"sweep table {name}", lambda s=shape: table_times(r, s, 128)))
        plan.append((f"sweep states {name}", lambda s=shape: state_times(r, s)))
    plan += sweep(r, first)
    if not r.dry:
        plan += sweep(r, (1, 48, 17776, 64))
    plan.append(("flex keep 0.05", lambda: flex_time(r, first, 0.05)))
    plan += sweep_backward(r, first)
    for n in (200,) if r.dry else [1024 << i for i in range(9)]:
        plan.append((f"scaling {n}", lambda n=n: scaling(r, n)))
    for (name, shape), keep in product(shapes.items(), KEEPS[1:]):
        plan.append((f"times {name} keep {keep}", lambda a=(shape, keep, 128): times(r, *a)))
    return plan


def one_by_one() -> None:
    """The launch table with key blocks of 64 one by one, for this process."""
    launch.LAUNCHES = tuple(replace(row, pairs=False) for row in launch.LAUNCHES)
    launch.find.cache_clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=450, help="seconds for the times")
    parser.add_argument("--workers", type=int, default=12, help="processes that check and compile")
    parser.add_argument("--part", choices=["all", "checks", "times"], default="all")
    parser.add_argument("--match", default="", help="only cases with this pattern in their name")
    parser.add_argument("--single", action="store_true", help="key blocks of 64 one by one")
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, in the interpreter")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.single:
        one_by_one()
    r = Run(options.out, options.budget, options.dry_run, once=options.shard is not None)
    if options.shard:
        part, parts = map(int, options.shard.split("/"))
        cases = checks(r) if options.part == "checks" else checks(r) + timings(r)
        cases = [case for case in cases if re.search(options.match, case[0])]
        for name, fn in cases[part::parts]:
            r.case(name, fn)
        return
    if options.part != "times":
        for line in shared(__file__, options):
            if line["case"].startswith("check") or "error" in line:
                r.add(line)
        print(f"checked and compiled after {time.monotonic() - r.start:.0f} s", flush=True)
    if options.part != "checks":
        for name, fn in timings(r):
            if re.search(options.match, name):
                r.case(name, fn)
    failed = [line["case"] for line in r.cases if "error" in line]
    print(f"{len(r.cases)} cases, {len(failed)} failed: {failed}")


if __name__ == "__main__":
    main()
