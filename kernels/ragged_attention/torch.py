"""Attention over ragged tiles in plain torch: tiles are padded once, kept ones gathered by rows.

Fast on the CPU, where the gathered tiles stay in the cache; correct on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.ragged_attention.reference import tile_of
from dit_accel.table import BlockTable

_CHUNK_CPU, _CHUNK_OTHER = 2**21, 2**28  # gathered bytes of K and V at a time


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    q_bounds: Tensor,
    k_bounds: Tensor,
    scale: float | None = None,
    gate: Tensor | None = None,
    coarse: Tensor | None = None,
    whole: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops.ragged_attention; (O, LSE)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = Tiles.of(q_bounds, table.block_q), Tiles.of(k_bounds, table.block_k)
    q_tiles, k_tiles, v_tiles = queries.cut(q), keys.cut(k), keys.cut(v)
    out = torch.zeros_like(q_tiles)
    lse = torch.full(q_tiles.shape[:2], -torch.inf, device=q.device)
    for rows, index, mask in _chunks(table, keys, 2 * k_tiles[0].numel() * k.element_size()):
        shape = (rows.stop - rows.start, -1, k.shape[-1])
        near, values = (x[index].view(shape) for x in (k_tiles, v_tiles))
        out[rows], lse[rows] = _attend(q_tiles[rows], near, values, mask, scale)
    out, lse = queries.join(out, q.shape), queries.join(lse, q.shape[:3])
    if gate is not None and coarse is not None:
        out = out + gate * coarse.to(out.dtype).index_select(2, tile_of(q_bounds))
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: BlockTable,
    q_bounds: Tensor,
    k_bounds: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv with P = exp(s − LSE) computed again; sums in float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = Tiles.of(q_bounds, table.block_q), Tiles.of(k_bounds, table.block_k)
    delta = (grad_out.float() * out.float()).sum(-1)
    delta = delta if grad_lse is None else delta - grad_lse
    q_tiles, grad, delta = (queries.cut(x.float()) for x in (q, grad_out, delta[..., None]))
    lse = queries.cut(lse.float()[..., None])
    k_tiles, v_tiles = keys.cut(k.float()), keys.cut(v.float())
    dq, dk, dv = (torch.zeros_like(x) for x in (q_tiles, k_tiles, v_tiles))
    for rows, index, mask in _chunks(table, keys, 8 * k_tiles[0].numel()):
        count, d = rows.stop - rows.start, k.shape[-1]
        near, values = (x[index].view(count, -1, d) for x in (k_tiles, v_tiles))
        ours, grads = q_tiles[rows], grad[rows]
        p = (ours @ near.mT * scale - lse[rows]).exp()
        p = p if mask is None else p.where(mask[:, None], 0)
        ds = p * (grads @ values.mT - delta[rows]) * scale
        dq[rows] = ds @ near
        for total, part in ((dk, ds.mT @ ours), (dv, p.mT @ grads)):
            total.index_add_(0, index, part.reshape(-1, table.block_k, d))
    dq = queries.join(dq, q.shape).to(q.dtype)
    return dq, keys.join(dk, k.shape).to(k.dtype), keys.join(dv, v.shape).to(v.dtype)


def tile_means(x: Tensor, bounds: Tensor) -> Tensor:
    """See ops.tile_means."""
    sums = x.new_zeros((*x.shape[:2], len(bounds) - 1, x.shape[3]), dtype=torch.float32)
    sums.index_add_(2, tile_of(bounds), x.float())
    return sums / bounds.diff()[:, None]


@dataclass(frozen=True)
class Tiles:
    """Tokens of ragged tiles, and where they stand once each tile is padded to `block`.

    place: int64 [N], token → its row in the padded sequence. valid: bool [M, block].
    """

    place: Tensor
    valid: Tensor
    block: int

    @classmethod
    def of(cls, bounds: Tensor, block: int) -> Tiles:
        tiles, first = tile_of(bounds), bounds[:-1].long()
        tokens = torch.arange(len(tiles), device=bounds.device)
        valid = torch.arange(block, device=bounds.device) < bounds.diff()[:, None]
        return cls(tokens - first[tiles] + tiles * block, valid, block)

    def cut(self, x: Tensor) -> Tensor:
        """[B·H·M, block, D] of x [B, H, N, D], zero where a tile is short."""
        padded = x.new_zeros((*x.shape[:2], self.valid.numel(), x.shape[3]))
        padded.index_copy_(2, self.place, x)
        return padded.view(-1, self.block, x.shape[3])

    def join(self, tiles: Tensor, shape: torch.Size) -> Tensor:
        """The reverse: tiles [B·H·M, block, …] as `shape` [B, H, N, …]."""
        padded = tiles.reshape(*shape[:2], self.valid.numel(), *shape[3:])
        return padded.index_select(2, self.place)


def _chunks(
    table: BlockTable, keys: Tiles, tile_bytes: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Rows of [B·H·Mq], the tiles of [B·H·Mk] that they read (flat), and which of these tokens
    count, bool [rows, K·block] (None: all). About a cache at a time."""
    heads = table.counts.shape[:2].numel()
    width, tiles = table.indices.shape[-1], keys.valid.shape[0]
    own = table.indices.flatten(0, 1).long()
    first = torch.arange(heads, device=own.device)[:, None, None] * tiles
    index, kept = (own + first).flatten(0, 1), table.valid().flatten(0, 2)
    cpu = own.device.type == "cpu"
    budget, least = (_CHUNK_CPU, torch.get_num_threads()) if cpu else (_CHUNK_OTHER, 1)
    step = max(least, budget // (width * tile_bytes))
    for start in range(0, len(index), step):
        rows = slice(start, min(start + step, len(index)))
        mask = keys.valid[index[rows] % tiles] & kept[rows][..., None]
        yield rows, index[rows].reshape(-1), None if bool(mask.all()) else mask.flatten(1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q [C, block, D] to k, v [C, L, D] where mask [C, L]: output, and LSE in float32."""
    if q.device.type == "cpu":
        # the operator behind scaled_dot_product_attention on the CPU; it returns the LSE too
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        bias = None if mask is None else _bias(mask, q)
        out, lse = flash(q[:, None], k[:, None], v[:, None], attn_mask=bias, scale=scale)
        out, lse = out[:, 0], lse[:, 0]
        if mask is not None and not mask.any(-1).all():  # a row that reads nothing
            none = ~mask.any(-1)
            out[none], lse[none] = 0, -torch.inf
        return out, lse
    scores = (q @ k.mT).float() * scale
    scores = scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.where(lse.isfinite(), 0)[..., None]).exp()
    return weights.to(v.dtype) @ v, lse


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """0 where a key counts, else −∞: [C, 1, block, L]."""
    bias = q.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    return bias[:, None, None].expand(-1, 1, q.shape[1], -1)
