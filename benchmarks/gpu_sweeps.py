"""Launches of the kernels tried against each other; gpu_kernels.py runs these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_run import Plan, Run, random_table
from triton.runtime.errors import OutOfResources

from dit_accel.kernels import launch
from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.block_sparse_attention import triton_backward as backward
from dit_accel.kernels.block_table import means
from dit_accel.kernels.block_table import select as choice
from dit_accel.kernels.block_table import triton as tables
from dit_accel.kernels.block_table.pool import pooled_blocks
from dit_accel.kernels.block_table.transpose import transpose_table
from dit_accel.kernels.launch import Launch, capability_of, find, run
from dit_accel.kernels.rectified_attention import triton as rectified
from dit_accel.kernels.sparse_linear_attention import states
from dit_accel.kernels.sparse_linear_attention import triton as linear

# Launches of the state kernel.
STATES = [
    {"tile": tile, "warps": warps, "stages": stages}
    for tile, warps, stages in ((32, 8, 3), (32, 8, 4), (64, 8, 3), (64, 16, 3), (128, 16, 2))
]


def sweep_forward(r: Run, shape: tuple[int, ...], block_q: int, block_k: int, row: Launch) -> dict:
    q, k, v = (r.tokens(*shape) for _ in range(3))
    table = random_table(r, q, shape[2], block_q, block_k, 0.05)
    expected = sparse.block_sparse_attention(q, k, v, table)
    out = torch.empty_like(q)
    call = sparse.forward(q, k, v, out, None, table, row)
    kernel = sparse._block_sparse_attention_fwd_kernel
    run(kernel, *call)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    ms = r.ms(lambda: run(kernel, *call))
    kept = 4e-9 * shape[1] * shape[2] ** 2 * shape[3] * table.density().item()
    return {"launch": str(row), "ms": ms, "kept_tflops": kept / ms}


def backward_times(r: Run, shape: tuple[int, ...], block: int, tiles: dict[str, Launch]) -> dict:
    """dq and dkdv one by one, for given launches, and the forward beside them."""
    q, k, v, grad = (r.tokens(*shape) for _ in range(4))
    table = random_table(r, q, shape[2], block, block, 0.05)
    out, lse = sparse.block_sparse_attention(q, k, v, table, return_lse=True)
    tensors = {"q": q, "k": k, "v": v, "do": grad, "lse": lse, "delta": torch.empty_like(lse)}
    transposed = transpose_table(table)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    common = (tensors, table, None, None)
    dq_call = backward.dq_launch(*common, tiles["dq"], out, None, dq)
    dkdv_call = backward.dkdv_launch(*common, tiles["dkdv"], transposed, dk, dv)
    calls = {
        "dq": (backward._block_sparse_attention_bwd_dq_kernel, *dq_call),
        "dkdv": (backward._block_sparse_attention_bwd_dkdv_kernel, *dkdv_call),
    }
    ms = {name: r.ms(lambda call=call: run(*call)) for name, call in calls.items()}
    ms["transpose"] = r.ms(lambda: transpose_table(table))
    ms["forward"] = r.ms(lambda: sparse.block_sparse_attention(q, k, v, table))
    return {"ms": ms, "launches": {name: str(row) for name, row in tiles.items()}}


def coefficient_times(r: Run, shape: tuple[int, ...], block_q: int) -> dict[str, Any]:
    """r and C, their means known, for several launches."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    options = {"return_means": True, "spreads": True}
    table, means = tables.block_table(q, k, 0.05, block_q, 64, **options)
    row, ms = find("coefficients", capability_of(q), shape[3], block_q), {}
    expected = rectified.coefficients(q, k, v, table, means=means)[0]
    for tile, warps, stages in product((16, 32), (4, 8), (1, 2, 3)):
        if r.dry and (tile, warps, stages) != (32, 4, 2):
            continue
        new = replace(row, tile=tile, warps=warps, stages=stages, provenance="")
        name = f"tile {tile} warps {warps} stages {stages}"
        try:
            found = rectified.coefficients(q, k, v, table, means=means, launch=new)[0]
        except OutOfResources as error:
            ms[name] = str(error)
            continue
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        ms[name] = r.ms(
            lambda new=new: rectified.coefficients(q, k, v, table, means=means, launch=new)
        )
    return {"launch": str(row), "ms": ms}


@contextmanager
def launched(op: str, **options: int) -> Iterator[None]:
    """The launch table with other options in the rows of an op."""
    rows = launch.LAUNCHES
    launch.LAUNCHES = tuple(replace(row, **options) if row.op == op else row for row in rows)
    launch.find.cache_clear()
    try:
        yield
    finally:
        launch.LAUNCHES = rows
        launch.find.cache_clear()


def table_times(r: Run, shape: tuple[int, ...], block_q: int) -> dict[str, Any]:
    """Microseconds of the table's kernels and of the pool, for several launches."""
    q, k, v = (r.tokens(*shape) for _ in range(3))
    options = {"return_means": True, "spreads": True}
    (table, known), found = tables.block_table(q, k, 0.05, block_q, 64, **options), {}
    for tile, warps in product((32, 64, 128), (1, 2, 4)):
        name = f"columns {tile}, {warps} warps"
        with launched("spreads", tile=tile, warps=warps):
            call = partial(means.query_key_means, q, k, block_q, 64, spread=True)
            found[f"spreads, {name}"] = r.kernels(call)
        with launched("means", tile=tile, warps=warps):
            call = partial(means.query_key_means, q, k, block_q, 64)
            found[f"means, {name}"] = r.kernels(call)
            call = partial(pooled_blocks, k, v, 64, known=known.k, rest=True)
            found[f"pool, {name}"] = r.kernels(call)
    select = choice.select_launch
    try:
        for blocks in (512, 1024):
            choice.select_launch = lambda width, n=blocks: replace(
                select(width), warps=min(16, max(1, width // n))
            )
            call = partial(tables.block_table, q, k, 0.05, block_q, 64)
            assert torch.equal(call().indices, table.indices)
            found[f"choice, {blocks} blocks a warp"] = r.kernels(call)
    finally:
        choice.select_launch = select
    return {"us": found}


def state_times(r: Run, shape: tuple[int, ...]) -> dict[str, Any]:
    """Microseconds of the projected states of all keys."""
    k, v = (r.tokens(*shape) for _ in range(2))
    call = partial(linear.projected_state, k, v, torch.eye(shape[3], device=r.device), "softmax")
    expected, found, programs = call(None), {}, states._PROGRAMS
    try:
        for states._PROGRAMS, row in product((132, 264, 396), STATES):
            if r.dry and (states._PROGRAMS, row) != (264, STATES[0]):
                continue
            with launched("state", **row):
                for x, y in zip(call(None), expected, strict=True):
                    torch.testing.assert_close(x, y, atol=1e-3, rtol=1e-2)
                found[f"{states._PROGRAMS} programs, {row}"] = r.kernels(lambda: call(None))
    finally:
        states._PROGRAMS = programs
    return {"us": found}


def score_times(r: Run, shape: tuple[int, ...], block_q: int) -> dict[str, Any]:
    """The table, for several launches of its scores."""
    q, k = (r.tokens(*shape) for _ in range(2))
    columns, ms = tables.MEAN_TILE, {}
    call = partial(tables.block_table, q, k, 0.05, block_q, 64)
    expected = call()
    try:
        for width, warps, stages in product((32, 64), (4, 8), (1, 2, 3)):
            if r.dry and (width, warps, stages) != (32, 4, 2):
                continue
            tables.MEAN_TILE = width
            with launched("scores", warps=warps, stages=stages):
                same = (call().indices == expected.indices).float().mean().item()
                assert same > 0.99, same  # a near tie may fall otherwise
                name = f"columns {width} warps {warps} stages {stages}"
                ms[name] = r.graph_ms(call)
    finally:
        tables.MEAN_TILE = columns
    return {"ms": ms}


def sweep(r: Run, shape: tuple[int, ...]) -> Plan:
    """The forward kernel's tile, warps, stages and loads for three pairs of blocks."""
    capability = capability_of(torch.empty(0, device=r.device))
    loads = [(stages, True) for stages in (2, 3, 4)] + [(3, False)]
    plan: Plan = []
    for bq, bk in [(64, 64)] if r.dry else [(128, 64), (64, 64), (128, 128)]:
        row = find("forward", capability, shape[3], bq, specialized=False)
        for tile, warps, (stages, tma) in product((64, 128), (4, 8), loads):
            if tile > bk or (r.dry and (warps, stages) != (4, 3)):
                continue
            change = {"tile": tile, "warps": warps, "stages": stages, "descriptors": tma}
            new = replace(row, **change, provenance="")
            name = f"sweep forward d{shape[3]} {bq}x{bk} {change}"
            plan.append((name, lambda a=(bq, bk, new): sweep_forward(r, shape, *a)))
    return plan


def sweep_backward(r: Run, shape: tuple[int, ...]) -> Plan:
    capability = capability_of(torch.empty(0, device=r.device))
    plan: Plan = []
    for block in (64,) if r.dry else (64, 128):
        rows = {
            op: find(op, capability, shape[3], block, specialized=False) for op in ("dq", "dkdv")
        }
        for tile, warps, stages in product((32, 64), (4, 8), (2,)):
            if r.dry and (tile, warps, stages) != (64, 4, 2):
                continue
            change = {"tile": tile, "warps": warps, "stages": stages, "provenance": ""}
            new = {op: replace(row, **change) for op, row in rows.items()}
            name = f"sweep backward block {block} tile {tile} warps {warps} stages {stages}"
            plan.append((name, lambda a=(block, new): backward_times(r, shape, *a)))
    return plan
