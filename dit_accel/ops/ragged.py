"""Attention over tiles of unequal length, and their means: the operators and their registration.

Tile m of a sequence is the tokens bounds[m] … bounds[m + 1] (cumulative lengths, int32 [M + 1]), at
most one block of them. A table of such tiles is that of M whole blocks: n_q = Mq · block_q.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.ops import dispatch
from dit_accel.ops.checks import check_qkv, default_scale
from dit_accel.ops.registration import _laid_out_as
from dit_accel.table import BlockTable


def tile_means(x: Tensor, bounds: Tensor) -> Tensor:
    """[B, H, M, D] float32: the mean of each tile of x [B, H, N, D]; differentiable."""
    check_bounds("bounds", bounds, None, x)
    return _tile_means(x, bounds)


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
) -> Tensor:
    """O_i = softmax over the keys of the kept tiles, plus gate_i ⊙ coarse_n of its tile n.

    The fine branch of VSA (arXiv 2505.13389), and with a gate the sum of both. Differentiable in q,
    k, v, gate and coarse at the given table; float32 sums.

    Args:
        q: [B, H, N_q, D]; k, v: [B, H, N_k, D], any strides.
        table: of Mq and Mk whole blocks, one for each tile; a row names its tiles in any order.
        q_bounds, k_bounds: int32 [Mq + 1] and [Mk + 1]: 0, …, N; no tile is longer than a block.
        scale: of the softmax; None is 1/√D.
        gate: like q, with coarse [B, H, Mq, D]; or neither.

    Raises ValueError for shapes that do not fit together.
    """
    check_qkv(q, k, v)
    check_bounds("q_bounds", q_bounds, table.query_blocks, q)
    check_bounds("k_bounds", k_bounds, table.key_blocks, k)
    if (gate is None) != (coarse is None):
        raise ValueError("a gate and what it weighs come together: give both or neither")
    if (
        gate is not None
        and coarse is not None
        and (gate.shape != q.shape or coarse.shape != (*table.counts.shape, q.shape[3]))
    ):
        raise ValueError(
            f"gate is like q {list(q.shape)} and coarse [B, H, Mq, D], not {list(gate.shape)} and "
            f"{list(coarse.shape)}"
        )
    indices, whole = _whole_first(table, k_bounds)
    sizes = (table.block_q, table.block_k, default_scale(scale, q))
    rows = (indices, table.counts, whole, q_bounds, k_bounds)
    learned = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, gate, coarse)
    )
    if not learned:
        return _ragged(q, k, v, *rows, gate, coarse, *sizes)[0]
    out = _ragged(q, k, v, *rows, None, None, *sizes)[0]
    if gate is None or coarse is None:
        return out
    return out + gate * of_tiles(coarse, q_bounds, q.shape[2]).to(out.dtype)


def check_bounds(name: str, bounds: Tensor, tiles: int | None, x: Tensor) -> None:
    """ValueError unless `bounds` may be those of x [B, H, N, D]."""
    if bounds.dtype != torch.int32 or bounds.dim() != 1 or bounds.device != x.device:
        raise ValueError(
            f"{name} is int32 [M + 1] on {x.device}, not {bounds.dtype} {list(bounds.shape)} on "
            f"{bounds.device}"
        )
    if tiles is not None and len(bounds) != tiles + 1:
        raise ValueError(f"{name} has {len(bounds)} entries, and the table asks for {tiles + 1}")


def _whole_first(table: BlockTable, k_bounds: Tensor) -> tuple[Tensor, Tensor]:
    """The table's indices with whole tiles in front, and how many of these each row has."""
    short = k_bounds.diff() < table.block_k
    blocks = table.key_blocks
    late = short[table.indices.long()]
    keys = table.indices + blocks * late.int() + 2 * blocks * (~table.valid()).int()
    indices = (keys.sort(-1).values % blocks).int()
    return indices, (~late & table.valid()).sum(-1, dtype=torch.int32)


def of_tiles(x: Tensor, bounds: Tensor, n: int) -> Tensor:
    """[B, H, n, D]: the rows of x [B, H, M, D], each for the tokens of its tile."""
    return x.index_select(2, _tiles(bounds, n))


def _tiles(bounds: Tensor, n: int) -> Tensor:
    """int64 [n]: the tile of each token; does not wait for the device."""
    tokens = torch.arange(n, device=bounds.device, dtype=bounds.dtype)
    return torch.bucketize(tokens, bounds[1:].contiguous(), right=True)


@torch.library.custom_op("dit_accel::ragged_attention", mutates_args=())
def _ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    whole: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    gate: Tensor | None,
    coarse: Tensor | None,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    table = _table(indices, counts, q_bounds, k_bounds, block_q, block_k)
    fn = dispatch.select("ragged_attention", q, block_q=block_q, block_k=block_k).fn
    out, lse = fn(q, k, v, table, q_bounds, k_bounds, scale, gate, coarse, whole)
    return _laid_out_as(q, out), lse


@_ragged.register_fake
def _(q: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("dit_accel::ragged_attention_backward", mutates_args=())
def _ragged_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    counts: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    table = _table(indices, counts, q_bounds, k_bounds, block_q, block_k)
    fn = dispatch.select("ragged_attention.backward", q, block_q=block_q, block_k=block_k).fn
    dq, dk, dv = fn(grad_out, grad_lse, q, k, v, out, lse, table, q_bounds, k_bounds, scale)
    return _laid_out_as(q, dq), _laid_out_as(k, dk), _laid_out_as(v, dv)


@_ragged_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx, inputs, output):
    q, k, v, indices, counts, _, q_bounds, k_bounds, _, _, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, indices, counts, q_bounds, k_bounds)


def _gradient(ctx, grad_out, grad_lse):
    grads = _ragged_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *[None] * 10


_ragged.register_autograd(_gradient, setup_context=_keep)


@torch.library.custom_op("dit_accel::tile_means", mutates_args=())
def _tile_means(x: Tensor, bounds: Tensor) -> Tensor:
    return dispatch.select("ragged_attention.tile_means", x).fn(x, bounds)


@_tile_means.register_fake
def _(x: Tensor, bounds: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], len(bounds) - 1, x.shape[3]), dtype=torch.float32)


def _keep_sizes(ctx, inputs, output):
    x, bounds = inputs
    ctx.n, ctx.dtype = x.shape[2], x.dtype
    ctx.save_for_backward(bounds)


def _mean_gradient(ctx, grad):
    (bounds,) = ctx.saved_tensors
    each = grad / bounds.diff()[:, None]
    return each.index_select(2, _tiles(bounds, ctx.n)).to(ctx.dtype), None


_tile_means.register_autograd(_mean_gradient, setup_context=_keep_sizes)


def _table(
    indices: Tensor,
    counts: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    block_q: int,
    block_k: int,
) -> BlockTable:
    n_q, n_k = ((len(b) - 1) * size for b, size in ((q_bounds, block_q), (k_bounds, block_k)))
    return BlockTable(indices, counts, block_q, block_k, n_q, n_k)
