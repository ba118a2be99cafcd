"""Hopper's gradients beside the plain kernels: a first check of each, times, then all checks.

    python benchmarks/gpu_backward.py --out backward.json           a minute on an H200, 16 cores
    python benchmarks/gpu_backward.py --out /tmp/x.json --dry-run    compiles only, without a GPU

Processes, one for each candidate, compile it and check it once. Another takes the times, in
milliseconds, each case printed as it ends: the kernels at 75,600 and 32,760 tokens, then whole
operators. What is left of --budget seconds goes to the other checks. Each case is written as it
ends, with its error if it failed; a process that hangs is killed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # a dry run compiles

import torch
from gpu_run import SHAPES, Plan, Run, random_table
from torch import Tensor

from dit_accel import ops
from dit_accel.kernels.aot_cases import compile_row
from dit_accel.kernels.block_sparse_attention import gluon_backward as hopper
from dit_accel.kernels.block_sparse_attention import reference
from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.block_sparse_attention import triton_backward as plain
from dit_accel.kernels.block_table.transpose import transpose_table
from dit_accel.kernels.launch import Launch, capability_of, find, run
from dit_accel.table import BlockTable
from dit_accel.testing import assert_close

MADE = {"dq": ("dq",), "dkdv": ("dk", "dv"), "gradients": ("dq", "dk", "dv")}
FIRST = 22  # seconds until the times begin, at the latest
CASES = (
    # n_q, n_k, d, block_q, block_k, dtype, extra
    (1000, 700, 128, 128, 128, torch.bfloat16, ""),
    (2100, 2100, 128, 128, 128, torch.bfloat16, ""),
    (1000, 700, 128, 128, 128, torch.bfloat16, "kv_len"),
    (1000, 700, 128, 128, 128, torch.bfloat16, "dlse"),
    (1000, 900, 128, 128, 64, torch.bfloat16, ""),
    (900, 1000, 64, 64, 128, torch.float16, ""),
    (900, 1000, 64, 64, 128, torch.float16, "kv_len"),
    (1000, 700, 128, 64, 64, torch.float16, ""),
)


def name_of(row: Launch) -> str:
    return f"{row.op}, blocks of {row.block}, {row.stages} stages"


def kernel_of(row: Launch) -> Any:
    if row.op == "dq":
        return hopper._block_sparse_attention_hopper_bwd_dq_kernel
    return hopper._block_sparse_attention_hopper_bwd_dkdv_kernel


def serves(row: Launch, block_q: int, block_k: int) -> bool:
    return row.block == (block_q if row.op == "dq" else block_k)


def call_of(row: Launch, x: hopper.Gradient, grads: list[Tensor], total: Tensor | None) -> Any:
    if row.op == "dq":
        return hopper.dq_launch(x, row, grads[0])
    return hopper.dkdv_launch(x, row, transpose_table(x.table), *grads[1:], total)


def gradients(row: Launch, x: hopper.Gradient) -> dict[str, Tensor]:
    """What a row of the launch table makes of dq, dk and dv."""
    grads = [torch.full_like(y, torch.nan) for y in (x.q, x.k, x.v)]
    total = hopper.total_of(x) if row.op == "gradients" else None
    run(kernel_of(row), *call_of(row, x, grads, total))
    if total is not None:
        hopper.finish(x, total, grads[0])
    return {
        name: g for name, g in zip(("dq", "dk", "dv"), grads, strict=True) if name in MADE[row.op]
    }


def check(
    r: Run, row: Launch, n: int, n_k: int, d: int, block_q: int, block_k: int, extra: str
) -> dict[str, Any]:
    """Errors against naive gradients in float32; of rows of no block, of one and of two, too."""
    q, grad, k, v = (r.tokens(1, 2, size, d) for size in (n, n, n_k, n_k))
    table = random_table(r, q, n_k, block_q, block_k, 0.5)
    for i in range(min(3, table.counts.shape[2])):
        table.counts[0, 0, i] = min(i, int(table.counts[0, 0, i]))
    kv_len = n_k // 2 + 1 if extra == "kv_len" else None
    if kv_len is not None:
        k[:, :, kv_len:], v[:, :, kv_len:] = torch.nan, torch.nan
    out, lse = reference.block_sparse_attention(q, k, v, table, None, True, kv_len)
    dlse = torch.randn_like(lse) if extra == "dlse" else None
    made = gradients(row, hopper.prepare(grad, dlse, q, k, v, out, lse, table, None, kv_len))
    expected = []
    for dtype in (torch.float32, q.dtype):
        leaves = [y.detach().to(dtype).requires_grad_() for y in (q, k, v)]
        outs = reference.block_sparse_attention(*leaves, table, None, True, kv_len, dtype=dtype)
        loss = (outs[0] * grad.to(dtype)).sum()
        if dlse is not None:
            loss = loss + (outs[1] * dlse.to(dtype)).where(outs[1].isfinite(), 0).sum()
        grads = torch.autograd.grad(loss, leaves)
        expected.append(dict(zip(("dq", "dk", "dv"), grads, strict=True)))
    for name, x in made.items():
        assert_close(name, x, *(wanted[name] for wanted in expected))
    return {
        "largest": max((x.float() - expected[0][n]).abs().max().item() for n, x in made.items())
    }


def checks(r: Run, row: Launch, part: str) -> Plan:
    """The first case that a row serves, or the others."""
    plan: Plan = []
    for n, n_k, d, block_q, block_k, dtype, extra in CASES:
        if serves(row, block_q, block_k):

            def one(a=(n, n_k, d, block_q, block_k, extra), dtype=dtype):
                r.dtype = dtype
                return check(r, row, *a)

            plan.append((f"check {name_of(row)}: d{d} {block_q}x{block_k} {extra} {n}", one))
    return plan[:1] if part == "first" else plan[1:]


def problem(r: Run, shape: tuple[int, ...], block_q: int, block_k: int) -> tuple[Any, ...]:
    """The arguments of `backward` at a random table of 5 %."""
    q, k, v, grad = (r.tokens(*shape) for _ in range(4))
    table = random_table(r, q, shape[2], block_q, block_k, 0.05)
    out, lse = sparse.block_sparse_attention(q, k, v, table, return_lse=True)
    return grad, None, q, k, v, out, lse, table


def work(x: Tensor, table: BlockTable) -> float:
    """TFLOP of five products over the kept pairs."""
    return 10e-12 * x.shape[1] * x.shape[2] ** 2 * x.shape[3] * table.density().item()


def kernels(r: Run, shape: tuple[int, ...], block_q: int, block_k: int) -> dict[str, Any]:
    """Milliseconds of every kernel that a backward is made of."""
    call = problem(r, shape, block_q, block_k)
    grad, _, q, k, v, out, lse, table = call
    grads, turned = [torch.empty_like(y) for y in (q, k, v)], transpose_table(table)
    tensors = {"q": q, "k": k, "v": v, "do": grad, "lse": lse, "delta": torch.empty_like(lse)}
    rows = [
        find(op, capability_of(q), q.shape[-1], block, specialized=False)
        for op, block in (("dq", block_q), ("dkdv", block_k))
    ]
    common = (tensors, table, None, None)
    dq = plain.dq_launch(*common, rows[0], out, None, grads[0])
    dkdv = plain.dkdv_launch(*common, rows[1], turned, *grads[1:])
    ms = {
        "transposed table": r.ms(lambda: transpose_table(table)),
        "plain dq": r.ms(lambda: run(plain._block_sparse_attention_bwd_dq_kernel, *dq)),
        "plain dkdv": r.ms(lambda: run(plain._block_sparse_attention_bwd_dkdv_kernel, *dkdv)),
        "LSE and delta": r.ms(lambda: hopper.prepare(*call)),
    }
    x = hopper.prepare(*call)
    total = hopper.total_of(x)
    ms["zeros for dq"] = r.ms(lambda: hopper.total_of(x))
    ms["dq of its sum"] = r.ms(lambda: hopper.finish(x, total, grads[0]))
    for row in hopper.CANDIDATES:
        if serves(row, block_q, block_k):
            given = total if row.op == "gradients" else None
            name, launch = name_of(row), call_of(row, x, grads, given)

            def once(row=row, launch=launch):
                launch[1]["taken"].zero_()
                run(kernel_of(row), *launch)

            ms[name] = r.ms(once)
    return {"tflop": work(q, table), "ms": ms}


def chosen(op: str, _: int, __: int, block: int) -> Launch:
    """The first candidate for an op and a block, in the place of `find`."""
    return next(row for row in hopper.CANDIDATES if row.op == op and row.block == block)


def operators(r: Run, shape: tuple[int, ...], block_q: int, block_k: int) -> dict[str, Any]:
    """Milliseconds of forward, of whole backwards, and of forward and backward of operators, by
    the plain kernels, by the first candidates, and by those that give the same bits each time."""
    call = problem(r, shape, block_q, block_k)
    q, k, v, table = call[2], call[3], call[4], call[7]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    weight = (torch.randn(shape[3], shape[3], device=r.device) / shape[3]).requires_grad_()

    def both(op: Any, *more: Any) -> None:
        torch.autograd.grad(op(*leaves, table, *more), (*leaves, *more), call[0])

    timed = {
        "backward": lambda: sparse.backward(*call),
        "sparse": lambda: both(ops.block_sparse_attention),
        "pooled": lambda: both(ops.pooled_attention),
        "SLA": lambda: both(ops.sparse_linear_attention, weight),
    }
    ms = {"forward": r.ms(lambda: sparse.block_sparse_attention(q, k, v, table, return_lse=True))}
    pooled = "dit_accel.kernels.pooled_attention.triton.specialized"
    with patch.object(plain, "specialized", lambda *_: None), patch(pooled, lambda *_: None):
        ms |= {f"{name}, plain": r.ms(fn) for name, fn in timed.items()}
    theirs = patch.object(plain, "specialized", lambda *_: hopper), patch(pooled, lambda *_: hopper)
    with theirs[0], theirs[1], patch.object(hopper, "find", chosen):
        ms |= {name: r.ms(fn) for name, fn in timed.items()}
        with patch.object(torch, "are_deterministic_algorithms_enabled", lambda: True):
            ms |= {f"{name}, same bits": r.ms(timed[name]) for name in ("backward", "SLA")}
            again = [sparse.backward(*call) for _ in range(2)]
    same = all(map(torch.equal, *again))
    return {"tflop": work(q, table), "ms": ms, "the same bits twice": same}


def timings(r: Run) -> Plan:
    plan: Plan = []
    small, large = SHAPES.items()
    first = [((128, 128), large), ((128, 128), small), ((128, 64), large)]
    for fn, blocks, (name, shape) in (
        *((kernels, *x) for x in first), *((operators, *x) for x in first),
        (kernels, (64, 64), small), (operators, (64, 64), small),
    ):  # fmt: skip
        label = f"{fn.__name__} {name} keep 0.05 blocks {blocks[0]}x{blocks[1]}"
        plan.append((label, lambda fn=fn, a=(shape, *blocks): fn(r, *a)))
    return plan


def apart(r: Run, command: list[str], part: str, seconds: float) -> None:
    """Check every candidate in its own process: the first case, or the others."""
    deadline = time.monotonic() + seconds
    children = [
        subprocess.Popen([*command, f"--{part}", str(i)], stdout=subprocess.PIPE, text=True)
        for i in range(len(hopper.CANDIDATES))
    ]
    for row, child in zip(hopper.CANDIDATES, children, strict=True):
        try:
            output = child.communicate(timeout=max(0.5, deadline - time.monotonic()))[0]
            end = f"exit {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            output, end = child.communicate()[0], "killed"
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        failed = [line for line in lines if "error" in line]
        passed = f"{len(lines) - len(failed)} of {len(checks(r, row, part))}"
        r.add({"case": f"{part} checks {name_of(row)}", "passed": passed, "end": end,
               "failed": failed})  # fmt: skip
        why = failed[0]["error"][:120] if failed else ""
        print(f"{part} checks {name_of(row)}: {passed}, {end} {why}", flush=True)


def table_of(r: Run) -> str:
    """The times, a kernel or operator a line, a case a column."""
    cases = [line for line in r.cases if "ms" in line]
    rows = [f"{i}: {line['case']}, {line['tflop']:.3f} TFLOP" for i, line in enumerate(cases)]
    for name in dict.fromkeys(name for line in cases for name in line["ms"]):
        found = [line["ms"].get(name) for line in cases]
        rows.append(" | ".join([name, *("" if x is None else f"{x:.3f}" for x in found)]))
    found = [line.get("the same bits twice") for line in cases]
    rows.append(f"the same bits twice: {found}")
    rows += [f"{line['case']}: {line['error'][:200]}" for line in r.cases if "error" in line]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=60, help="seconds")
    parser.add_argument("--dry-run", action="store_true", help="compile ahead of time only")
    for part in ("first", "other"):
        parser.add_argument(f"--{part}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    r = Run(options.out, options.budget, options.dry_run)
    if options.dry_run:
        for row in hopper.CANDIDATES:
            r.case(f"compile {name_of(row)}", lambda row=row: vars(compile_row(row)))
        return
    for part in ("first", "other"):
        if (i := getattr(options, part)) is not None:
            r.path = options.out.with_suffix(f".{part}{i}")
            for name, fn in checks(r, hopper.CANDIDATES[i], part):
                r.case(name, fn)
            return r.path.unlink()
    if options.time:
        for name, fn in timings(r):
            r.case(name, fn)
        return
    command = [sys.executable, __file__, "--out", str(options.out)]
    apart(r, command, "first", FIRST)
    times = options.out.with_suffix(".times")
    left = str(options.budget - (time.monotonic() - r.start))
    child = subprocess.Popen([*command[:3], str(times), "--budget", left, "--time"])
    try:
        child.wait(float(left) + 5)
    except subprocess.TimeoutExpired:  # a deadlock on the GPU, perhaps
        child.kill()
    for line in json.loads(times.read_text())["cases"] if times.exists() else []:
        r.add(line)
    times.unlink(missing_ok=True)
    print(table_of(r), flush=True)
    apart(r, command, "other", options.budget + 10 - (time.monotonic() - r.start))
    for path in options.out.parent.glob(f"{options.out.stem}.*[0-9]"):
        path.unlink()


if __name__ == "__main__":
    main()
