"""The first-order term of the pooled tail: values of a skipped block as a line of its keys.

    Σ_{j∈m} e^{s_ij} v_j = |m| e^{s̄_im} (v̄_m + q_i C_m) + O(‖k_j − k̄_m‖²),
    C_m = scale/|m| · Σ_{j∈m} (k_j − k̄_m)ᵀ v_j

The sum of weights has no such term, so the log-sum-exp stays. In plain torch, on any device;
PyTorch differentiates it.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from dit_accel.kernels.block_table.torch import block_means, block_sizes
from dit_accel.table import BlockTable

_CHUNK = 2**28  # bytes of weights at a time


def tail_line(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    lse: Tensor,
    scale: float,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """[B, H, N_q, D] float32, what the term adds to pooled_attention's output.

    O_i += q_i Σ_m z_nm C_m with the blocks' weights |m| e^{s̄_im − L_i}, averaged over the query
    block n into z_nm: one matrix for a block of queries instead of one for each.

    lse: [B, H, N_q] float32, that of pooled_attention.
    """
    block_q, block_k = table.block_q, table.block_k
    k, v = (x[:, :, :kv_len] if isinstance(kv_len, int) else x for x in (k, v))
    means = block_means(k, block_k, kv_len)
    blocks = means.shape[2]
    sizes = block_sizes(k.shape[2], block_k, kv_len, q.device)[..., :blocks]
    bias = sizes.log()[:, :, None].masked_fill(table.to_mask()[..., :blocks], -torch.inf)
    valid = _members(k.shape[2], blocks, block_k, kv_len, q.device)
    heads = []
    for b, h in product(range(q.shape[0]), range(q.shape[1])):
        keys, values = (_blocks(x[b, h], blocks, block_k) for x in (k, v))
        here = valid[b if len(valid) > 1 else 0]
        keys = (keys.float() - means[b, h, :, None]).where(here, 0)
        size = sizes[b if len(sizes) > 1 else 0, 0].clamp(min=1)
        slopes = keys.mT @ values.float().where(here, 0) * (scale / size)[:, None, None]
        rows = _blocks(q[b, h], table.query_blocks, block_q).float()  # [Mq, block, D]
        totals = _blocks(lse[b, h, :, None], table.query_blocks, block_q)
        step = max(1, _CHUNK // (4 * block_q * blocks))
        parts = [
            rows[at] @ _weighted(rows[at], totals[at], bias[b, h, at], means[b, h], scale, slopes)
            for at in (slice(i, i + step) for i in range(0, table.query_blocks, step))
        ]
        heads.append(torch.cat(parts).flatten(0, 1)[: q.shape[2]])
    return torch.stack(heads).unflatten(0, q.shape[:2])


def _weighted(
    rows: Tensor, totals: Tensor, bias: Tensor, means: Tensor, scale: float, slopes: Tensor
) -> Tensor:
    """[M, D, D]: the slopes of all blocks by their weights in each block of queries.

    rows [M, block, D], totals [M, block, 1] their log-sum-exp, bias [M, Mk], means [Mk, D], slopes
    [Mk, D, D]. A row beyond the last query is zero and has no weight.
    """
    scores = rows @ means.mT * scale + bias[:, None] - totals
    seen = (bias[:, None] > -torch.inf) & (totals > -torch.inf)
    weights = scores.where(seen, -torch.inf).exp()
    filled = (totals > -torch.inf).sum(1).clamp(min=1)
    mean = weights.sum(1) / filled
    return (mean @ slopes.flatten(1)).unflatten(1, slopes.shape[1:])


def _blocks(x: Tensor, blocks: int, block: int) -> Tensor:
    """x [N, …] as [blocks, block, …], filled up: a log-sum-exp with −∞, all else with zeros."""
    fill = -torch.inf if x.shape[-1] == 1 else 0.0
    missing = blocks * block - len(x)
    x = torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill) if missing else x
    return x.unflatten(0, (blocks, block))


def _members(
    n: int, blocks: int, block: int, kv_len: int | Tensor | None, device: torch.device
) -> Tensor:
    """[1 or B, blocks, block, 1] bool: which tokens are valid keys."""
    limit = torch.as_tensor(kv_len if isinstance(kv_len, Tensor) else n, device=device)
    places = torch.arange(blocks * block, device=device).unflatten(0, (blocks, block, 1))
    return places < limit.clamp(max=n).reshape(-1, 1, 1, 1)
