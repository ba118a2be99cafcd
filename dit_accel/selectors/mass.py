"""Rectified SpaAttn's critical set (arXiv 2511.19835): the K best blocks or as many as hold a mass
p of the pooled attention, whichever is more, with the neighbours and the text.
"""

from __future__ import annotations

from functools import lru_cache
from math import floor
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_table.torch import block_means, block_sizes
from dit_accel.table import BlockTable, block_count, kept_blocks


class Near(NamedTuple):
    """bool [Mq, Mk] of the blocks near a query block, and the most of them in a row."""

    mask: Tensor
    width: int


@lru_cache(maxsize=8)
def neighbours(
    n_q: int, n_k: int, block_q: int, block_k: int, reach: int, first: int, device: torch.device
) -> Near:
    """The key blocks that hold a query block's own tokens, and `reach` more on either side.

    first: where among the keys the first query stands.
    """
    start = torch.arange(0, n_q, block_q)[:, None] + first
    last = (start + block_q).clamp(max=first + n_q) - 1
    block = torch.arange(block_count(n_k, block_k))
    mask = (block >= start // block_k - reach) & (block <= last // block_k + reach)
    return Near(mask.to(device), int(mask.sum(-1).max()))


def mass_table(
    q: Tensor,
    k: Tensor,
    keep: float,
    mass: float,
    block_q: int = 64,
    block_k: int = 64,
    near: Near | None = None,
    forced: Tensor | None = None,
    n_forced: int = 0,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> BlockTable:
    """max(K, #{cumulative a ≤ p} + 1) best blocks of each row ∪ near ∪ forced.

    a_nm = softmax_m(scale · q̄_n·k̄_m + ln|m|) over the true number of tokens, in float32; the
    cumulative sum starts with the mass of the forced blocks. No device synchronisation.

    Args:
        q, k: [B, H, N_q, D], [B, H, N_k, D].
        keep: K = max(1, ceil(keep · Mk)).
        mass: p in [0, 1]; 0 is plain top-k.
        near: see `neighbours`.
        forced: bool [Mk] on the device with `n_forced` True, kept beside the K best; or None.
        scale: None is 1/√D.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    blocks = block_count(k.shape[2], block_k)
    sizes = block_sizes(k.shape[2], block_k, kv_len, k.device)
    scores = block_means(q, block_q) @ block_means(k, block_k, kv_len).mT * scale
    held = scores.shape[-1]  # an int kv_len leaves out the blocks behind it
    a = (scores + sizes[..., :held].log()[:, :, None]).softmax(-1)
    always = torch.zeros(held, dtype=torch.bool, device=q.device)
    always = always if forced is None else forced[:held]
    best = min(held, kept_blocks(keep, held))
    width = min(held, max(best, floor(mass * held) + 1))
    top = a.masked_fill(always, -1).topk(width)
    total = top.values.clamp(min=0).cumsum(-1) + (a * always).sum(-1, keepdim=True)
    count = ((total <= mass).sum(-1, keepdim=True) + 1).clamp(min=best)
    chosen = (torch.arange(width, device=q.device) < count) & (top.values >= 0)
    mask = torch.zeros(*a.shape[:3], blocks, dtype=torch.bool, device=q.device)
    mask.scatter_(-1, top.indices, chosen)
    extra = n_forced
    if near is not None:
        mask, extra = mask | near.mask, extra + near.width
    mask[..., :held] |= always
    mask &= sizes[:, :, None] > 0
    width = min(blocks, width + extra)
    return BlockTable.from_mask(mask, block_q, block_k, q.shape[2], k.shape[2], width)
