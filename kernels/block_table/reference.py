"""The block table, naively and in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.table import (
    BlockBits,
    BlockMeans,
    BlockTable,
    block_count,
    kept_blocks,
    table_width,
)


def block_table(
    q: Tensor,
    k: Tensor,
    keep: float,
    block_q: int = 64,
    block_k: int = 64,
    forced: Tensor | None = None,
    kv_len: int | Tensor | None = None,
    max_forced: int | None = None,
    mass: float = 0.0,
    near: Tensor | None = None,
    max_near: int = 0,
    scale: float | None = None,
    return_means: bool = False,
    spreads: bool = False,
) -> BlockTable | tuple[BlockTable, BlockMeans]:
    """The forced blocks of each row, and the best of the others; see ops.block_table."""
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    m_q, m_k = block_count(n_q, block_q), block_count(n_k, block_k)
    most = block_count(kv_len, block_k) if isinstance(kv_len, int) else m_k
    width = table_width(keep, most, 0 if forced is None else max_forced, mass, max_near)
    lengths = torch.as_tensor(n_k if kv_len is None else kv_len).expand(batch).tolist()
    if forced is None:
        forced = torch.zeros(m_k, dtype=torch.bool)
    forced = forced.cpu().expand(batch, heads, m_q, m_k)
    mask = torch.zeros(batch, heads, m_q, m_k, dtype=torch.bool)
    device, dtype, q, k = q.device, q.dtype, q.float().cpu(), k.float().cpu()
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        if lengths[b] == 0:
            continue
        blocks = k[b, h, : lengths[b]].split(block_k)
        means = torch.stack([block.mean(0) for block in blocks])
        for n, block in enumerate(q[b, h].split(block_q)):
            row = forced[b, h, n, : len(blocks)].clone()
            scores, count = means @ block.mean(0), kept_blocks(keep, len(blocks))
            if mass > 0:
                sizes = torch.tensor([float(len(block)) for block in blocks])
                scores = scores * (q.shape[3] ** -0.5 if scale is None else scale) + sizes.log()
                share = scores.softmax(0)
                best = share[~row].sort(descending=True).values
                count = max(count, int((share[row].sum() + best.cumsum(0) <= mass).sum()) + 1)
            scores = scores.masked_fill(row, -torch.inf)
            row[scores.topk(min(count, int((~row).sum()))).indices] = True
            if near is not None:
                row |= near[n, : len(blocks)].cpu()
            mask[b, h, n, : len(blocks)] = row
    table = BlockTable.from_mask(mask.to(device), block_q, block_k, n_q, n_k, width)
    if not return_means:
        return table
    table = replace(table, bits=BlockBits(table.to_bits(most), kv_len))
    sides = (q.to(device), block_q, [n_q] * batch), (k.to(device), block_k, lengths)
    means = [block_means(*side) for side in sides]
    far = [None] * 2
    if spreads:
        far = [block_spreads(*side).to(dtype) for side in sides]
    return table, BlockMeans(*means, *far, kv_len)


def block_means(x: Tensor, block: int, lengths: list[int]) -> Tensor:
    """[B, H, M, D] in the dtype of x: means of each sample's valid tokens, zero without any."""
    return _of_blocks(x, block, lengths, lambda part: part.mean(1))


def block_spreads(x: Tensor, block: int, lengths: list[int]) -> Tensor:
    """[B, H, M, D] in the dtype of x: mean absolute deviations from these means."""
    return _of_blocks(
        x, block, lengths, lambda part: (part - part.mean(1, keepdim=True)).abs().mean(1)
    )


def _of_blocks(x: Tensor, block: int, lengths: list[int], of: Callable[[Tensor], Tensor]) -> Tensor:
    rows = []
    for tokens, length in zip(x, lengths, strict=True):
        found = [of(part) for part in tokens[:, :length].split(block, 1)] if length else []
        found += [torch.zeros_like(x[0, :, 0])] * (block_count(x.shape[2], block) - len(found))
        rows.append(torch.stack(found, 1))
    return torch.stack(rows)
