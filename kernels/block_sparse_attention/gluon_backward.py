"""Launches of Hopper's gradients of block-sparse attention: what they serve, with what."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.gluon import (
    descriptor,
    multiprocessors,
    unknown,
    unreadable,
    valid_counts,
)
from dit_accel.kernels.block_sparse_attention.gluon_backward_kernel import (
    _block_sparse_attention_hopper_bwd_dkdv_kernel,
    _block_sparse_attention_hopper_bwd_dq_kernel,
)
from dit_accel.kernels.block_sparse_attention.triton_ends import (
    _block_sparse_attention_bwd_stats_kernel,
    _block_sparse_attention_bwd_sum_kernel,
)
from dit_accel.kernels.block_table.transpose import transpose_table
from dit_accel.kernels.launch import Launch, find, run
from dit_accel.kernels.tiles import log2_scale, table_rows
from dit_accel.table import BlockTable, block_count

_candidate = partial(
    Launch, capability=90, head_dim=128, tile=64, warps=4, descriptors=True, specialized=True,
    provenance="a candidate",
)  # fmt: skip
# What benchmarks/gpu_backward.py tries; the launch table has the fastest.
CANDIDATES = (
    *(_candidate("gradients", block=128, stages=x) for x in (2, 3)),
    _candidate("dq", block=128, stages=3),
    _candidate("dkdv", block=128, stages=3),
    _candidate("dq", block=64, stages=2),
    _candidate("dkdv", block=64, stages=2),
)
_SMALL = Launch("ends", 80, 128, 64, 64, warps=4, stages=1)


class Gradient(NamedTuple):
    """What the kernels of a gradient share.

    stats: [B, H, T, 2, 64] float32, of T tiles of 64 queries: LSE in log2 units, +inf for rows
        without a key, and δ.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    stats: Tensor
    table: BlockTable
    scale: float
    n_valid: int


def unserved(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, table: BlockTable, kv_len: int | Tensor | None
) -> str | None:
    """Why these kernels cannot serve a call of `backward`, or None."""
    return unknown(q, table, kv_len) or unreadable(q, k, v, grad)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv as of triton_backward.py, for calls that `unserved` accepts.

    With key blocks of 128 one kernel makes all three; its sums for dq are in an order that changes
    from run to run. After torch.use_deterministic_algorithms(True), and with key blocks of 64, two
    kernels make them, the same bits each time.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    x = prepare(grad_out, grad_lse, q, k, v, out, lse, table, scale, kv_len)
    turned = transpose_table(table)
    if table.block_k == 128 and not torch.are_deterministic_algorithms_enabled():
        row = find("gradients", 90, q.shape[-1], table.block_k)
        total = total_of(x)
        call = dkdv_launch(x, row, turned, dk, dv, total)
        run(_block_sparse_attention_hopper_bwd_dkdv_kernel, *call)
        finish(x, total, dq)
    else:
        row = find("dq", 90, q.shape[-1], table.block_q)
        run(_block_sparse_attention_hopper_bwd_dq_kernel, *dq_launch(x, row, dq))
        keys_and_values(x, turned, dk, dv)
    return dq, dk, dv


def keys_and_values(
    x: Gradient,
    turned: tuple[Tensor, Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
    pool_grads: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write dk and dv, over the transposed table."""
    row = find("dkdv", 90, x.q.shape[-1], x.table.block_k)
    call = dkdv_launch(x, row, turned, dk, dv, None, pool_grads)
    run(_block_sparse_attention_hopper_bwd_dkdv_kernel, *call)


def prepare(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | None = None,
) -> Gradient:
    """LSE and δ as the kernels read them, and the rest of the problem."""
    batch, heads, n, d = q.shape
    tiles = table.query_blocks * table.block_q // 64
    stats = q.new_empty((batch, heads, tiles, 2, 64), dtype=torch.float32)
    arguments = {
        "o": out, "do": grad_out, "lse": lse.contiguous(),
        "dlse": None if grad_lse is None else grad_lse.contiguous(), "stats": stats,
        "s_o": out.stride(), "s_do": grad_out.stride(), "n_q": n, "n_stats": tiles, "D": d,
    }  # fmt: skip
    run(_block_sparse_attention_bwd_stats_kernel, (tiles, heads, batch), arguments, _SMALL)
    n_valid = k.shape[2] if kv_len is None else min(kv_len, k.shape[2])
    return Gradient(q, k, v, grad_out, stats, table, d**-0.5 if scale is None else scale, n_valid)


def dq_launch(
    x: Gradient, launch: Launch, dq: Tensor
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the dq kernel."""
    table = x.table
    indices, width = table_rows(table)
    counts = valid_counts(table, x.n_valid)
    arguments = {
        "d_q": descriptor(x.q, x.q.shape[2], 64), "d_do": descriptor(x.do, x.q.shape[2], 64),
        "d_k": descriptor(x.k, x.n_valid, 64), "d_v": descriptor(x.v, x.n_valid, 64),
        "d_dq": descriptor(dq, dq.shape[2], 64), "indices": indices, "counts": counts,
        "width": width, "n_x": x.n_valid, **_common(x, launch, table.query_blocks),
    }  # fmt: skip
    return _grid(counts, table.block_q, x.q), arguments, launch


def dkdv_launch(
    x: Gradient,
    launch: Launch,
    transposed: tuple[Tensor, Tensor, Tensor],
    dk: Tensor,
    dv: Tensor,
    total: Tensor | None = None,
    pool_grads: tuple[Tensor, Tensor] | None = None,
) -> tuple[tuple[int, ...], dict[str, object], Launch]:
    """Grid, arguments and launch of the dk and dv kernel.

    total: [B, H, T, 64, D] float32, a sum that dq / scale is added to.
    pool_grads: as of dkdv_launch in triton_backward.py.
    """
    pool_dk, pool_dv = pool_grads or (None, None)
    starts, counts, rows = transposed
    n_q = x.q.shape[2]
    arguments = {
        "d_k": descriptor(x.k, x.n_valid, 64), "d_v": descriptor(x.v, x.n_valid, 64),
        "d_q": descriptor(x.q, n_q, 64), "d_do": descriptor(x.do, n_q, 64),
        "d_dk": descriptor(dk, dk.shape[2], 64), "d_dv": descriptor(dv, dv.shape[2], 64),
        "pool_dk": pool_dk, "pool_dv": pool_dv,
        "n_pool": 0 if pool_dk is None else pool_dk.shape[2],
        "total": total, "indices": rows, "starts": starts, "counts": counts, "width": 0,
        "n_x": n_q, "n_valid": x.n_valid,
        **_common(x, launch, x.table.key_blocks),
    }  # fmt: skip
    return _grid(counts, x.table.block_k, x.q), arguments, launch


def total_of(x: Gradient) -> Tensor:
    """The sum that dq is to be added to, zeros; how a tile lies, triton_ends.py knows."""
    batch, heads, _, d = x.q.shape
    shape = (batch, heads, x.stats.shape[2], 64, d)
    return torch.zeros(shape, dtype=torch.float32, device=x.q.device)


def finish(x: Gradient, total: Tensor, dq: Tensor) -> None:
    """dq of its sum."""
    batch, heads, tiles, _, d = total.shape
    arguments = {
        "total": total, "dq": dq, "s_dq": dq.stride(), "n_q": dq.shape[2], "n_stats": tiles,
        "scale": x.scale, "D": d,
    }  # fmt: skip
    run(_block_sparse_attention_bwd_sum_kernel, (tiles, heads, batch), arguments, _SMALL)


def _common(x: Gradient, launch: Launch, rows: int) -> dict[str, object]:
    batch, heads, _, d = x.q.shape
    return {
        "taken": torch.zeros(1, dtype=torch.int32, device=x.q.device),
        "stats": x.stats, "m_rows": rows, "n_heads": heads, "n_rows": batch * heads * rows,
        "n_stats": x.stats.shape[2], "scale2": log2_scale(x.scale, x.q), "scale": x.scale,
        "BLOCK_Q": x.table.block_q, "BLOCK_K": x.table.block_k, "D": d, "STAGES": launch.stages,
    }  # fmt: skip


def _grid(counts: Tensor, block: int, q: Tensor) -> tuple[int]:
    return (min(block_count(counts.numel() * block, 128), multiprocessors(q.device)),)
