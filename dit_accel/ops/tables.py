"""The choice of blocks as torch.library sees it; see registration.py."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.ops import dispatch
from dit_accel.table import Keep, bit_words, block_count, table_width


@torch.library.custom_op("dit_accel::block_table", mutates_args=())
def block_table(
    q: Tensor,
    k: Tensor,
    keep: list[float],
    block_q: int,
    block_k: int,
    forced: Tensor | None,
    length: Tensor | None,
    limit: int | None,
    max_forced: int | None,
    mass: float,
    near: Tensor | None,
    max_near: int,
    scale: float,
    return_means: bool,
    spreads: bool,
    parts: int,
) -> list[Tensor]:
    chosen = dispatch.select("block_table", q, block_q=block_q, block_k=block_k)
    kv_len = limit if length is None else length
    options = (forced, kv_len, max_forced, mass, near, max_near, scale, return_means, spreads)
    found = chosen.fn(q, k, _keep(keep), block_q, block_k, *options, parts)
    if not return_means:
        return [found.indices, found.counts]
    table, means = found
    far = [means.q_far, means.k_far] if spreads else []
    return [table.indices, table.counts, table.bits.words, means.q, means.k, *far]


@block_table.register_fake
def _(q, k, keep, block_q, block_k, forced, length, limit, max_forced, mass, near, max_near, *rest):
    rows = (*q.shape[:2], block_count(q.shape[2], block_q))
    blocks = block_count(k.shape[2] if limit is None else limit, block_k)
    width = table_width(max(keep), blocks, 0 if forced is None else max_forced, mass, max_near)
    outs = [q.new_empty((*rows, width), dtype=torch.int32), q.new_empty(rows, dtype=torch.int32)]
    _, return_means, spreads, _ = rest
    columns = (*k.shape[:2], block_count(k.shape[2], block_k), k.shape[3])
    if return_means:
        outs.append(q.new_empty((*rows, bit_words(columns[2])), dtype=torch.int32))
    for dtype in ((torch.float32, q.dtype) if spreads else (torch.float32,)) * return_means:
        outs += [q.new_empty(shape, dtype=dtype) for shape in ((*rows, q.shape[3]), columns)]
    return outs


def _keep(shares: list[float]) -> Keep:
    return shares[0] if len(shares) == 1 else tuple(shares)


@torch.library.custom_op("dit_accel::choose_blocks", mutates_args=())
def choose_blocks(
    scores: Tensor,
    keep: list[float],
    block_q: int,
    block_k: int,
    n_q: int,
    n_k: int,
    forced: Tensor | None,
    length: Tensor | None,
    limit: int | None,
    max_forced: int | None,
    mass: float,
    near: Tensor | None,
    max_near: int,
) -> tuple[Tensor, Tensor, Tensor]:
    fn = dispatch.select("block_table.choose_blocks", scores, scored=True).fn
    kv_len = limit if length is None else length
    options = (forced, kv_len, max_forced, mass, near, max_near)
    table = fn(scores, _keep(keep), block_q, block_k, n_q, n_k, *options)
    return table.indices, table.counts, table.bits.words


@choose_blocks.register_fake
def _(scores, keep, block_q, block_k, n_q, n_k, forced, length, limit, max_forced, mass, near, *m):
    blocks = block_count(n_k if limit is None else limit, block_k)
    width = table_width(max(keep), blocks, 0 if forced is None else max_forced, mass, *m)
    rows, words = scores.shape[:3], bit_words(block_count(n_k, block_k))
    sizes = ((*rows, width), rows, (*rows, words))
    return tuple(scores.new_empty(size, dtype=torch.int32) for size in sizes)
