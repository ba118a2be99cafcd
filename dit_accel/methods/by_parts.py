"""A method over keys that come in parts, from one process after another (Ring Self-Attention, arXiv
2105.13120): blocks are chosen among all of them, outputs merged by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.base import Call, Method
from dit_accel.parallel.sharded import Merged, Ring
from dit_accel.table import BlockTable, block_count


def attend(
    method: Method, q: Tensor, text: Tensor, k: Tensor, v: Tensor, call: Call, ring: Ring
) -> tuple[Tensor, Tensor]:
    """(output of the queries q by the method, that of `text` by dense attention).

    q [B, H, N, D] and text [B, H, T, D], this process's; k, v [B, H, n, D], its part of the keys.
    """
    table = _table(method, q, k, call, ring)
    call.note(table)
    seen, beside = Merged(), Merged()
    for first, k_part, v_part in ring.parts(k, v):
        n = k_part.shape[2]
        seen.add(*method.part(q, k_part, v_part, table.columns(first, n), call))
        if text.shape[2]:
            beside.add(*_dense(text, k_part, v_part, call.scale))
    assert seen.out is not None, "a ring has parts"
    out = method.complete(seen.out, q, k, v, call).to(q.dtype)
    return out, text if beside.out is None else beside.out.to(text.dtype)


def _table(method: Method, q: Tensor, k: Tensor, call: Call, ring: Ring) -> BlockTable:
    """What `Method.table` would choose: means of blocks are all that travels for it."""
    block_q, block_k = method.sizes(q, call)
    q_mean = ops.block_means(q.detach(), block_q)
    k_mean = ring.blocks(ops.block_means(k.detach(), block_k), block_k)
    keep = method.share(call.keep, block_count(ring.n, block_k))
    return ops.choose_blocks(
        q_mean @ k_mean.mT,
        keep,
        q.shape[2],
        ring.n,
        block_q,
        block_k,
        forced=call.forced,
        max_forced=call.n_forced,
    )


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention to all of k, and its log-sum-exp."""
    n_q, n_k = q.shape[2], k.shape[2]
    blocks = block_count(n_k, 64)
    shape = (*q.shape[:2], block_count(n_q, 64))
    indices = torch.arange(blocks, device=q.device, dtype=torch.int32).expand(*shape, -1)
    counts = torch.full(shape, blocks, device=q.device, dtype=torch.int32)
    table = BlockTable(indices.contiguous(), counts, 64, 64, n_q, n_k)
    return ops.block_sparse_attention(q, k, v, table, scale, return_lse=True)
