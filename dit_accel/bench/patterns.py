"""Block tables of one kept share and different shape: which blocks, and how many in each row.

The axis of patterns of the long-context attention benchmark. A kernel's time depends on the share
that is kept, and on this shape: on whether rows are equally long, and what their neighbours read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.table import BlockTable, block_count, kept_blocks

SPREAD = 1.5  # of budgets between heads: from a quarter of the mean to seven quarters
_SEED = 0


def table(name: str, q: Tensor, k: Tensor, keep: float, block: int) -> BlockTable:
    """The table of a pattern for q and k [B, H, N, D], in square blocks.

    Every pattern keeps ⌈keep · M⌉ of the M key blocks in the mean of all rows. Raises ValueError
    for an unknown pattern.
    """
    check(name)
    return PATTERNS[name](q, k, keep, block)


def check(name: str) -> None:
    """ValueError for an unknown pattern."""
    if name not in PATTERNS:
        raise ValueError(f"unknown pattern {name!r}; the benchmark has {', '.join(PATTERNS)}")


def topk(q: Tensor, k: Tensor, keep: float, block: int) -> BlockTable:
    """The best blocks of each row by the scores of their means: every row its own, equally long."""
    return ops.block_table(q, k, keep, block, block)


def random(q: Tensor, k: Tensor, keep: float, block: int) -> BlockTable:
    """As many blocks in every row, drawn anew for each: nothing that neighbours share."""
    rows = _rows(q, block)
    counts = torch.full(rows, kept_blocks(keep, block_count(k.shape[2], block)), dtype=torch.int32)
    return _drawn(q, k, counts, block)


def window(q: Tensor, k: Tensor, keep: float, block: int) -> BlockTable:
    """A band around the diagonal: neighbouring rows read nearly the same blocks."""
    n_rows, blocks = _rows(q, block)[2], block_count(k.shape[2], block)
    kept = kept_blocks(keep, blocks)
    middle = (torch.arange(n_rows) + 0.5) * blocks / n_rows
    first = (middle - kept / 2).round().clamp(0, blocks - kept).int()
    return _equal(
        q, k, (first[:, None] + torch.arange(kept)).expand(_rows(q, block)[1], -1, -1), block
    )


def stripe(q: Tensor, k: Tensor, keep: float, block: int) -> BlockTable:
    """Columns at even distances, the same for all rows of a head, one further in the next head."""
    _, heads, n_rows = _rows(q, block)
    blocks = block_count(k.shape[2], block)
    kept = kept_blocks(keep, blocks)
    shift = torch.arange(heads)[:, None] / heads
    columns = ((torch.arange(kept) + shift) * (blocks / kept)).floor()
    return _equal(q, k, columns[:, None].expand(-1, n_rows, -1), block)


def per_head(q: Tensor, k: Tensor, keep: float, block: int) -> BlockTable:
    """As `topk`, with a budget for each head, from a quarter of the mean to seven quarters."""
    heads, blocks = q.shape[1], block_count(k.shape[2], block)
    weights = torch.linspace(1 - SPREAD / 2, 1 + SPREAD / 2, heads) if heads > 1 else torch.ones(1)
    counts = shared_out(kept_blocks(keep, blocks) * heads, weights, blocks)
    return ops.block_table(q, k, tuple((counts.double() / blocks).tolist()), block, block)


def top_p(q: Tensor, k: Tensor, keep: float, block: int) -> BlockTable:
    """Rows of unequal length, as where each takes what holds a share of its attention.

    Scores of random tokens are flat and would give rows of one length, so the lengths are drawn:
    log-normal with σ = 1, scaled to the mean.
    """
    rows, blocks = _rows(q, block), block_count(k.shape[2], block)
    weights = torch.randn(rows, generator=_chance()).exp()
    counts = shared_out(kept_blocks(keep, blocks) * weights.numel(), weights, blocks)
    return replace(_drawn(q, k, counts, block), uneven=True)


PATTERNS: dict[str, Callable[[Tensor, Tensor, float, int], BlockTable]] = {
    "topk": topk,
    "random": random,
    "window": window,
    "stripe": stripe,
    "per-head": per_head,
    "top-p": top_p,
}


def shared_out(total: int, weights: Tensor, most: int) -> Tensor:
    """int32 like weights: whole numbers from 1 to `most` near the weights' ratios, `total` in sum.

    ValueError where so many cannot have such a sum.
    """
    count = weights.numel()
    if not count <= total <= count * most:
        raise ValueError(f"{count} numbers from 1 to {most} do not have the sum {total}")
    whole = (weights.flatten() * (total / weights.sum())).round().clamp(1, most).long()
    while (left := total - int(whole.sum())) != 0:
        free = (whole < most if left > 0 else whole > 1).nonzero()[:, 0]
        step = max(1, abs(left) // len(free))  # a ceiling leaves much over
        moved = free[torch.randperm(len(free), generator=_chance())[: abs(left)]]
        whole[moved] = (whole[moved] + (step if left > 0 else -step)).clamp(1, most)
    return whole.int().view(weights.shape)


def _rows(q: Tensor, block: int) -> tuple[int, int, int]:
    return q.shape[0], q.shape[1], block_count(q.shape[2], block)


def _chance() -> torch.Generator:
    return torch.Generator().manual_seed(_SEED)


def _equal(q: Tensor, k: Tensor, columns: Tensor, block: int) -> BlockTable:
    """The table of columns [H, Mq, K] that all count."""
    indices = columns.int().to(q.device).expand(q.shape[0], -1, -1, -1).contiguous()
    counts = torch.full_like(indices[..., 0], indices.shape[-1])
    return BlockTable(indices, counts, block, block, q.shape[2], k.shape[2])


def _drawn(q: Tensor, k: Tensor, counts: Tensor, block: int) -> BlockTable:
    """The table whose rows hold `counts` [B, H, Mq] blocks by chance."""
    blocks, width = block_count(k.shape[2], block), int(counts.max())
    counts = counts.to(q.device).contiguous()
    chance = torch.Generator(q.device).manual_seed(_SEED)
    indices = q.new_empty(*counts.shape, width, dtype=torch.int32)
    columns = torch.arange(width, device=q.device)
    for of_head, kept in zip(indices.flatten(0, 1), counts.flatten(0, 1), strict=True):
        order = torch.rand(len(kept), blocks, device=q.device, generator=chance).argsort(-1)
        drawn = order[:, :width].masked_fill(columns >= kept[:, None], blocks).sort(-1).values
        of_head.copy_(drawn.clamp(max=blocks - 1))
    return BlockTable(indices, counts, block, block, q.shape[2], k.shape[2])
