"""Block-sparse attention in plain torch: gather the kept blocks of a few rows, attend, repeat.

Fast on the CPU, where the gathered blocks stay in the cache; correct on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.table import BlockTable, block_count

# Gathered bytes of K and V at a time: few enough for a cache, enough to keep all threads busy.
_CHUNK_CPU, _CHUNK_OTHER = 2**21, 2**28


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ...,
    return_lse: Literal[False] = ..., kv_len: int | Tensor | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ..., *,
    return_lse: Literal[True], kv_len: int | Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ...,
    return_lse: bool = ..., kv_len: int | Tensor | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    return_lse: bool = False,
    kv_len: int | Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.block_sparse_attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = Rows.of(table, kv_len)
    q_blocks = rows.sort(as_blocks(q, table.block_q))
    k_blocks, v_blocks = (as_blocks(x, table.block_k) for x in (k, v))
    out = torch.zeros_like(q_blocks)
    lse = torch.full(q_blocks.shape[:2], -torch.inf, device=q.device)
    for chunk in rows.chunks(2 * k_blocks[0].numel() * k.element_size()):
        keys, values = chunk.gather(k_blocks), chunk.gather(v_blocks)
        out[chunk.rows], lse[chunk.rows] = _attend(q_blocks[chunk.rows], keys, values, scale)
    out = as_tokens(rows.unsort(out), q.shape)
    return (out, as_tokens(rows.unsort(lse), q.shape[:3])) if return_lse else out


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
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv with P = exp(s − LSE) computed again; sums in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = Rows.of(table, kv_len)
    delta = (grad_out.float() * out.float()).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    q_blocks, grad, delta, lse = (
        rows.sort(as_blocks(x, table.block_q)).float()
        for x in (q, grad_out, delta[..., None], lse[..., None])
    )
    k_blocks, v_blocks = (as_blocks(x, table.block_k) for x in (k, v))
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q_blocks, k_blocks, v_blocks))
    for chunk in rows.chunks(8 * k_blocks[0].numel()):
        keys, values = chunk.gather(k_blocks).float(), chunk.gather(v_blocks).float()
        queries, grads = q_blocks[chunk.rows], grad[chunk.rows]
        p = (queries @ keys.mT * scale - lse[chunk.rows]).exp()
        ds = p * (grads @ values.mT - delta[chunk.rows]) * scale
        dq[chunk.rows] = ds @ keys
        chunk.add(dk, ds.mT @ queries)
        chunk.add(dv, p.mT @ grads)
    dq = as_tokens(rows.unsort(dq).to(q.dtype), q.shape)
    dk, dv = (as_tokens(grad.to(k.dtype), k.shape) for grad in (dk, dv))
    return dq, dk, dv


@dataclass(frozen=True)
class Chunk:
    """Rows that read the same number of keys: `rows` of the sorted rows, `index` [C·n] of the
    [B·H·Mk] key blocks, of which the first `length` tokens of each row's n blocks count."""

    rows: slice
    index: Tensor
    length: int

    def gather(self, blocks: Tensor) -> Tensor:
        """[C, length, D] from blocks [B·H·Mk, block, D]."""
        _, block, d = blocks.shape
        # Whole blocks are copied as long rows, the fastest form of index_select.
        found = blocks.view(-1, block * d).index_select(0, self.index)
        return found.view(self.rows.stop - self.rows.start, -1, d)[:, : self.length]

    def add(self, blocks: Tensor, x: Tensor) -> None:
        """Adds x [C, length, D] to the blocks that `gather` read."""
        _, block, d = blocks.shape
        missing = -self.length % block
        x = torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
        blocks.view(-1, block * d).index_add_(0, self.index, x.reshape(-1, block * d))


@dataclass(frozen=True)
class Rows:
    """The table's rows sorted by the number of keys they read, so that no chunk needs a mask.

    index: [R, K] key blocks in [0, B·H·Mk), ascending, so that a short last block comes last.
    runs: (number of rows, keys of each), in the sorted order.
    order: the sorted rows' places, or None when they are in place already.
    """

    index: Tensor
    runs: list[tuple[int, int]]
    order: Tensor | None
    block_k: int

    @classmethod
    def of(cls, table: BlockTable, kv_len: int | Tensor | None) -> Rows:
        """Reads the counts back from the device."""
        n, block = table.n_k, table.block_k
        indices, blocks = table.indices.long(), table.key_blocks
        limit = torch.as_tensor(n if kv_len is None else kv_len, device=indices.device)
        left = limit.clamp(max=n).reshape(-1, 1, 1, 1) - indices * block
        lengths = left.clamp(0, block).where(table.valid(), 0)
        # Blocks without a token go to the end: rows then begin with the blocks they read.
        index = indices.where(lengths > 0, blocks).sort(-1).values.clamp(max=blocks - 1)
        heads = torch.arange(table.counts.shape[:2].numel(), device=index.device) * blocks
        index = index.flatten(0, 1) + heads[:, None, None]
        index, lengths = index.flatten(0, 1), lengths.sum(-1).flatten()
        order = None
        if lengths.numel() > 1 and bool((lengths.diff() < 0).any()):
            lengths, order = lengths.sort(stable=True)
            index = index[order]
        found, repeats = lengths.unique_consecutive(return_counts=True)
        runs = list(zip(repeats.tolist(), found.tolist(), strict=True))
        return cls(index, runs, order, block)

    def sort(self, x: Tensor) -> Tensor:
        """Rows [R, …] in the sorted order."""
        return x if self.order is None else x[self.order]

    def unsort(self, x: Tensor) -> Tensor:
        """The reverse of `sort`."""
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def chunks(self, block_bytes: int) -> Iterator[Chunk]:
        """Runs of rows whose gathered blocks, of block_bytes each, are about one cache."""
        cpu = self.index.device.type == "cpu"
        budget, least = (_CHUNK_CPU, torch.get_num_threads()) if cpu else (_CHUNK_OTHER, 1)
        start = 0
        for rows, length in self.runs:
            end, blocks = start + rows, block_count(length, self.block_k)
            step = max(least, budget // max(1, blocks * block_bytes))
            for first in range(start, end if length else start, step):
                here = slice(first, min(end, first + step))
                yield Chunk(here, self.index[here, :blocks].reshape(-1), length)
            start = end


def as_blocks(x: Tensor, block: int) -> Tensor:
    """[B·H·M, block, D] from x [B, H, N, D]: a view if it can be, else one copy, zero-padded."""
    batch, heads, n, d = x.shape
    if n % block == 0:
        return x.reshape(-1, block, d).contiguous()
    padded = x.new_zeros(batch, heads, block_count(n, block) * block, d)
    padded[:, :, :n] = x
    return padded.view(-1, block, d)


def as_tokens(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The reverse of as_blocks: blocks [B·H·M, block, …] as `shape` [B, H, N, …]."""
    return blocks.reshape(*shape[:2], -1, *shape[3:])[:, :, : shape[2]].contiguous()


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention of q [C, block_q, D] to k, v [C, L, D]: output, and LSE in float32."""
    if q.device.type == "cpu":
        # The operator behind scaled_dot_product_attention on the CPU; it returns the LSE too.
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q[:, None], k[:, None], v[:, None], scale=scale)
        return out[:, 0], lse[:, 0]
    scores = (q @ k.mT).float() * scale
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse
