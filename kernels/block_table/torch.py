"""The block table in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from dit_accel.table import BlockBits, BlockMeans, BlockTable, Keep, block_count, table_width

# Bytes of products of parts at a time.
_CHUNK_CPU, _CHUNK_OTHER = 2**21, 2**28


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
    sizes = (block_q, block_k, q.shape[2], k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    means = block_means(q, block_q), block_means(k, block_k, kv_len)
    if parts > 1:
        scores = part_scores(q, k, block_q, block_k, kv_len, scale, parts)
    else:
        scores = means[0] @ means[1].mT  # [B, H, Mq, Mk]
    share = scores if parts > 1 else None
    if mass > 0 and parts == 1:
        scores *= scale
        scores += block_sizes(k.shape[2], block_k, kv_len, k.device)[
            ..., None, : scores.shape[-1]
        ].log()
        share = scores.softmax(-1)
    table = _choose(scores, share, keep, sizes, forced, kv_len, max_forced, mass, near, max_near)
    if not return_means:
        return table
    live = block_count(kv_len if isinstance(kv_len, int) else k.shape[2], block_k)
    table = replace(table, bits=BlockBits(table.to_bits(live), kv_len))
    q_far = k_far = None
    if spreads:
        q_far = block_spreads(q, means[0], block_q).to(q.dtype)
        k_far = block_spreads(k, means[1], block_k, kv_len).to(q.dtype)
        k_far = _whole(k_far, table.key_blocks)
    return table, BlockMeans(means[0], _whole(means[1], table.key_blocks), q_far, k_far, kv_len)


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
    live = block_count(kv_len if isinstance(kv_len, int) else n_k, block_k)
    sizes = (block_q, block_k, n_q, n_k)
    scores = scores[..., :live].float()
    table = _choose(scores, scores, keep, sizes, forced, kv_len, max_forced, mass, near, max_near)
    return replace(table, bits=BlockBits(table.to_bits(live), kv_len))


def part_scores(
    q: Tensor,
    k: Tensor,
    block_q: int,
    block_k: int,
    kv_len: int | Tensor | None,
    scale: float,
    parts: int,
) -> Tensor:
    """[B, H, Mq, Mk] float32: of softmax_m(ln Σ_b |b| e^{s_ab}), s of the parts' means, the mean
    over a query block's parts a; an int kv_len drops the blocks after it."""
    heads, size = q.shape[:2], block_k // parts
    rows = _in_parts(block_means(q, block_q // parts), parts)
    columns = _in_parts(block_means(k, size, kv_len), parts)
    weight = block_sizes(q.shape[2], block_q // parts, None, q.device)[..., None]
    weight = _in_parts(weight, parts)[..., 0]  # [1, 1, Mq, parts]
    weight = weight / weight.sum(-1, keepdim=True)
    bias = block_sizes(k.shape[2], size, kv_len, k.device)[..., : columns.shape[2] * parts, None]
    bias = _in_parts(bias, parts).flatten(2).log()  # [1 or B, 1, Mk · parts]
    out = q.new_empty(*heads, rows.shape[2], columns.shape[2], dtype=torch.float32)
    chunk = _CHUNK_CPU if q.device.type == "cpu" else _CHUNK_OTHER
    step = max(1, chunk // (4 * parts * parts * columns.shape[2]))
    for b, h in product(*map(range, heads)):
        keys = columns[b, h].flatten(0, 1).mT * scale
        add = bias[b % len(bias), 0]
        for first in range(0, rows.shape[2], step):
            at = slice(first, first + step)
            level = torch.addmm(add, rows[b, h, at].flatten(0, 1), keys)
            level = level.unflatten(1, (-1, parts)).logsumexp(-1)
            share = level.softmax(-1).unflatten(0, (-1, parts))
            out[b, h, at] = (share * weight[0, 0, at, :, None]).sum(1)
    return out


def _in_parts(x: Tensor, parts: int) -> Tensor:
    """[B, H, m, D] as [B, H, M, parts, D], the last block filled up with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % parts)).unflatten(2, (-1, parts))


def _whole(x: Tensor, blocks: int) -> Tensor:
    """x [B, H, m, D] with the blocks after an int kv_len, as zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, blocks - x.shape[2]))


def _choose(
    scores: Tensor,
    share: Tensor | None,
    keep: Keep,
    sizes: tuple[int, int, int, int],
    forced: Tensor | None,
    kv_len: int | Tensor | None,
    max_forced: int | None,
    mass: float,
    near: Tensor | None,
    max_near: int,
) -> BlockTable:
    """The table of scores [B, H, Mq, m] of the m blocks that may hold a valid key; share: of the
    attention, for `mass`. sizes: block_q, block_k, N_q, N_k."""
    blocks, block_k, n_k = scores.shape[-1], sizes[1], sizes[3]
    best = table_width(keep, blocks, 0 if forced is None else max_forced, mass)
    counts = torch.full_like(scores[..., 0], best, dtype=torch.int32)
    equal = not (isinstance(keep, tuple) or isinstance(kv_len, Tensor))
    if mass > 0 or forced is not None or not equal:
        scores, wanted, held = _restrict(scores, keep, block_k, forced, kv_len)
        if mass > 0 and share is not None:
            wanted = torch.maximum(wanted, _holding(scores, share, mass))
        counts = torch.minimum(wanted, held).clamp(max=best).expand_as(counts).int().contiguous()
    chosen = scores.topk(best).indices
    columns = torch.arange(best, device=scores.device)
    chosen = chosen.where(columns < counts[..., None], blocks)
    if near is None:
        chosen = chosen.sort().values.clamp(max=blocks - 1)
        return BlockTable(chosen.int(), counts, *sizes)
    mask = scores.new_zeros(*counts.shape, blocks + 1, dtype=torch.bool).scatter_(-1, chosen, True)
    mask = mask[..., :blocks] | (near[:, :blocks] & (scores > -torch.inf))
    mask = torch.nn.functional.pad(mask, (0, block_count(n_k, block_k) - blocks))
    return BlockTable.from_mask(mask, *sizes, min(blocks, best + max_near))


def _holding(scores: Tensor, share: Tensor, mass: float) -> Tensor:
    """[B, H, Mq]: how many of the best, the forced ones before all, hold more than `mass`."""
    order = scores.argsort(-1, descending=True)
    return (share.gather(-1, order).cumsum(-1) <= mass).sum(-1) + 1


def block_means(x: Tensor, block: int, kv_len: int | Tensor | None = None) -> Tensor:
    """[B, H, M, D] float32: means of the blocks of x [B, H, N, D], of their valid tokens alone.

    An int kv_len drops the blocks after it; with a tensor [B] a block without a valid token is 0.
    """
    return _mean(x, block, kv_len, lambda part, _: part)


def block_spreads(
    x: Tensor, means: Tensor, block: int, kv_len: int | Tensor | None = None
) -> Tensor:
    """[B, H, M, D] float32: mean of |x − its block's mean| over each block's valid tokens."""
    return _mean(x, block, kv_len, lambda part, at: (part - means[:, :, at, None]).abs())


def _mean(
    x: Tensor,
    block: int,
    kv_len: int | Tensor | None,
    of: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """Means of `of`(tokens [B, H, m, block, D], their blocks) over the valid tokens of a block."""
    x = x[:, :, :kv_len] if isinstance(kv_len, int) else x
    n = x.shape[2]
    full = n // block
    parts = ((full * block, block, slice(0, full)), (n, n - full * block, slice(full, None)))
    sums, start = [], 0
    for end, size, at in parts:
        if start < end:
            part = of(x[:, :, start:end].unflatten(2, (-1, size)), at)
            if isinstance(kv_len, Tensor):
                valid = _valid(kv_len, n, x.device)[:, None, start:end, None]
                part = part.where(valid.unflatten(2, (-1, size)), 0)
            sums.append(part.sum(3, dtype=torch.float32))
        start = end
    total = torch.cat(sums, 2) if len(sums) > 1 else sums[0]
    return total / block_sizes(n, block, kv_len, x.device).clamp(min=1)[..., None]


def block_sizes(n: int, block: int, kv_len: int | Tensor | None, device: torch.device) -> Tensor:
    """[1 or B, 1, M] float32: valid tokens of each block of n keys."""
    limit = n if kv_len is None else kv_len
    starts = torch.arange(0, n, block, device=device)
    limits = torch.as_tensor(limit, device=device).reshape(-1, 1, 1)
    return (limits.clamp(max=n) - starts).clamp(0, block).float()


def _valid(kv_len: Tensor, n: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device) < kv_len.to(device)[:, None]


def _restrict(
    scores: Tensor, keep: Keep, block_k: int, forced: Tensor | None, kv_len: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with +inf for forced and −inf for empty blocks, the blocks each row wants, and has."""
    blocks = scores.shape[-1]
    held = torch.full((1, 1, 1), blocks, device=scores.device)
    if isinstance(kv_len, Tensor):
        held = ((kv_len.to(scores.device) + block_k - 1) // block_k).clamp(max=blocks)
        held = held.reshape(-1, 1, 1)
    share = torch.as_tensor(keep, dtype=torch.float64, device=scores.device).reshape(-1, 1)
    wanted = (share * held.double() - 1e-6).ceil().clamp(min=1)
    empty = torch.arange(blocks, device=scores.device) >= held[..., None]
    if forced is not None:
        chosen = forced[..., :blocks] & ~empty
        scores = scores.masked_fill(chosen, torch.inf)
        wanted = wanted + chosen.expand(*chosen.shape[:-1], blocks).sum(-1)
    return scores.masked_fill(empty, -torch.inf), wanted, held
