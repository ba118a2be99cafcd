"""The block table, naively and in fp32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from dit_accel.table import (
    BlockBits,
    BlockMeans,
    BlockTable,
    Keep,
    block_count,
    kept_blocks,
    table_width,
)


def block_table(
    q: Tensor,
    k: Tensor,
    keep: Keep,
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
    parts: int = 1,
) -> BlockTable | tuple[BlockTable, BlockMeans]:
    """The forced blocks of each row, and the best of the others; see ops.block_table."""
    (batch, heads, n_q, _), n_k = q.shape, k.shape[2]
    sizes, scale = (block_q, block_k, n_q, n_k), q.shape[3] ** -0.5 if scale is None else scale
    lengths = torch.as_tensor(n_k if kv_len is None else kv_len).expand(batch).tolist()
    device, dtype, q, k = q.device, q.dtype, q.float().cpu(), k.float().cpu()
    scores = torch.zeros(batch, heads, block_count(n_q, block_q), block_count(n_k, block_k))
    shares = torch.zeros_like(scores)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        if lengths[b] == 0:
            continue
        blocks = k[b, h, : lengths[b]].split(block_k)
        for n, block in enumerate(q[b, h].split(block_q)):
            if parts > 1:
                row = share = part_scores(block, blocks, block_q // parts, block_k // parts, scale)
            else:
                row = torch.stack([x.mean(0) for x in blocks]) @ block.mean(0)
                lens = torch.tensor([float(len(x)) for x in blocks])
                share = (row * scale + lens.log()).softmax(0)
            scores[b, h, n, : len(blocks)], shares[b, h, n, : len(blocks)] = row, share
    scores, shares = scores.to(device), shares.to(device)
    table = _choose(scores, shares, keep, *sizes, forced, kv_len, max_forced, mass, near, max_near)
    if not return_means:
        return table
    live = block_count(kv_len if isinstance(kv_len, int) else n_k, block_k)
    table = replace(table, bits=BlockBits(table.to_bits(live), kv_len))
    sides = (q.to(device), block_q, [n_q] * batch), (k.to(device), block_k, lengths)
    q_mean, k_mean = (block_means(*side) for side in sides)
    means = BlockMeans(q_mean, k_mean, kv_len=kv_len)
    if spreads:
        q_far, k_far = (block_spreads(*side).to(dtype) for side in sides)
        means = replace(means, q_far=q_far, k_far=k_far)
    return table, means


def part_scores(
    block: Tensor, blocks: tuple[Tensor, ...], size_q: int, size_k: int, scale: float
) -> Tensor:
    """[M]: how much attention a query block [n, D] gives to each of the key blocks, as the means of
    parts of so many tokens tell it; the parts of a block count by their tokens."""
    total = torch.zeros(len(blocks))
    for queries in block.split(size_q):
        levels = []
        for keys in blocks:
            logits = [part.mean(0) @ queries.mean(0) * scale for part in keys.split(size_k)]
            sizes = torch.tensor([float(len(part)) for part in keys.split(size_k)])
            levels.append((torch.stack(logits) + sizes.log()).logsumexp(0))
        total += torch.stack(levels).softmax(0) * len(queries)
    return total / len(block)


def choose_blocks(
    scores: Tensor,
    keep: Keep,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    forced: Tensor | None = None,
    kv_len: int | Tensor | None = None,
    max_forced: int | None = None,
    mass: float = 0.0,
    near: Tensor | None = None,
    max_near: int = 0,
) -> BlockTable:
    """See ops.choose_blocks."""
    sizes = (block_q, block_k, n_q, n_k)
    table = _choose(
        scores.float(), scores.float(), keep, *sizes, forced, kv_len, max_forced, mass, near,
        max_near,
    )  # fmt: skip
    live = block_count(kv_len if isinstance(kv_len, int) else n_k, block_k)
    return replace(table, bits=BlockBits(table.to_bits(live), kv_len))


def _choose(
    scores: Tensor,
    shares: Tensor,
    keep: Keep,
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    forced: Tensor | None,
    kv_len: int | Tensor | None,
    max_forced: int | None,
    mass: float,
    near: Tensor | None,
    max_near: int,
) -> BlockTable:
    """The table of scores [B, H, Mq, Mk] or, with a mass, of shares of the attention."""
    scores = shares if mass > 0 else scores
    batch, heads, m_q, m_k = scores.shape
    most = block_count(kv_len, block_k) if isinstance(kv_len, int) else m_k
    width = table_width(keep, most, 0 if forced is None else max_forced, mass, max_near)
    lengths = torch.as_tensor(n_k if kv_len is None else kv_len).expand(batch).tolist()
    if forced is None:
        forced = torch.zeros(m_k, dtype=torch.bool)
    forced = forced.cpu().expand(scores.shape)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for b, h, n in product(range(batch), range(heads), range(m_q)):
        live = block_count(lengths[b], block_k)
        if live == 0:
            continue
        row = forced[b, h, n, :live].clone()
        count = kept_blocks(keep[h] if isinstance(keep, tuple) else keep, live)
        if mass > 0:
            share = scores[b, h, n, :live].cpu()
            best = share[~row].sort(descending=True).values
            count = max(count, int((share[row].sum() + best.cumsum(0) <= mass).sum()) + 1)
        left = scores[b, h, n, :live].cpu().masked_fill(row, -torch.inf)
        row[left.topk(min(count, int((~row).sum()))).indices] = True
        if near is not None:
            row |= near[n, :live].cpu()
        mask[b, h, n, :live] = row
    return BlockTable.from_mask(mask.to(scores.device), block_q, block_k, n_q, n_k, width)


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
