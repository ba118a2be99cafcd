"""The public operators: differentiable, and whole under torch.compile.

q is [B, H, N_q, D], k and v are [B, H, N_k, D], any strides (a transposed [B, N, H, D] is read
without a copy by the CUDA kernels), float32, float16 or bfloat16, sums in float32. Which file of
dit_accel/kernels serves a call is decided by dit_accel.ops.dispatch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.kernels.int8_attention.rotate import rotated
from dit_accel.kernels.pooled_attention.line import tail_line
from dit_accel.kernels.rectified_attention.torch import coefficients, rectify
from dit_accel.ops import registration, tables
from dit_accel.ops.checks import (
    check_keep,
    check_kept,
    check_linear,
    check_means,
    check_parts,
    check_precision,
    check_qkv,
    check_scores,
    check_table,
    default_scale,
    same_len,
    split_kv_len,
)
from dit_accel.table import BlockBits, BlockMeans, BlockTable, Keep


@overload
def block_table(
    q: Tensor, k: Tensor, keep: Keep, block_q: int = ..., block_k: int = ...,
    forced: Tensor | None = ..., kv_len: int | Tensor | None = ..., max_forced: int | None = ...,
    mass: float = ..., near: Tensor | None = ..., max_near: int | None = ...,
    scale: float | None = ..., return_means: Literal[False] = ..., spreads: bool = ...,
    parts: int = ...,
) -> BlockTable: ...  # fmt: skip


@overload
def block_table(
    q: Tensor, k: Tensor, keep: Keep, block_q: int = ..., block_k: int = ...,
    forced: Tensor | None = ..., kv_len: int | Tensor | None = ..., max_forced: int | None = ...,
    mass: float = ..., near: Tensor | None = ..., max_near: int | None = ...,
    scale: float | None = ..., *, return_means: Literal[True], spreads: bool = ...,
    parts: int = ...,
) -> tuple[BlockTable, BlockMeans]: ...  # fmt: skip


def block_table(
    q: Tensor, k: Tensor, keep: Keep, block_q: int = 64, block_k: int = 64,
    forced: Tensor | None = None, kv_len: int | Tensor | None = None,
    max_forced: int | None = None, mass: float = 0.0, near: Tensor | None = None,
    max_near: int | None = None, scale: float | None = None, return_means: bool = False,
    spreads: bool = False, parts: int = 1,
) -> BlockTable | tuple[BlockTable, BlockMeans]:  # fmt: skip
    """The forced key blocks of each query block, the K best of the others, and those `near`.

    score = mean(q in block) · mean(k in block) over the true number of tokens, in float32;
    K = max(1, ceil(keep · M)) of the M key blocks that hold a valid key. With a mass p (top-p,
    arXiv 2511.19835) more than K where fewer hold no more than p of softmax_m(scale · score_m +
    ln|m|), the forced blocks' share counted first. Not differentiated, no device synchronisation.

    A block of several parts is scored by the attention that the means of its parts tell (BiFormer's
    second level, arXiv 2303.08810): mean over the parts a of the query block of
    softmax_m(ln Σ_b |b| e^{scale · q̄_a·k̄_b}), b over the parts of key block m. Parts of one token
    give the exact shares, one part the order of the means.

    Args:
        q, k: [B, H, N_q, D] and [B, H, N_k, D].
        keep: share of the key blocks, in (0, 1], or a tuple with one for each head.
        block_q, block_k: tokens in a block.
        forced: bool, broadcastable to [B, H, Mq, Mk]: blocks kept in addition to the K best.
        kv_len: number of valid keys, int or int tensor [B]; the keys after it are never read and
            blocks without a valid key never chosen.
        max_forced: an upper bound of the forced blocks in one row: it bounds the table's width
            (None: counted if `forced` is in host memory, else all Mk).
        mass: p in [0, 1); 0 is plain top-K.
        near: bool [Mq, Mk], blocks that compete as all others and are kept even if they lose.
        max_near: as max_forced, for `near`.
        scale: of the softmax that gives the mass and the scores of parts, None is 1/√D.
        return_means: also return the block means, and the table with its bits, for pooled_attention
            and rectified_attention of the same q and k, which then read these once less.
        spreads: with them the mean deviations that the veto of rectified_attention needs.
        parts: of a block, a power of two that divides block_q and block_k.

    Raises ValueError for arguments outside these ranges.
    """
    check_qkv(q, k, k)
    check_parts(parts, block_q, block_k)
    sizes = (block_q, block_k, q.shape[2], k.shape[2])
    shares = check_keep(keep, q.shape[1])
    kept = check_kept(q.shape[:2], sizes, q.device, forced, max_forced, mass, near, max_near)
    forced, max_forced, near, max_near = kept
    length, limit = split_kv_len(kv_len, k)
    critical = (float(mass), near, max_near, default_scale(scale, q))
    # a mean that requires gradients would promise some
    indices, counts, *known = tables.block_table(
        q.detach(), k.detach(), shares, block_q, block_k, forced, length, limit, max_forced,
        *critical, return_means, spreads, parts
    )  # fmt: skip
    uneven = _uneven(shares, mass)
    if not return_means:
        return BlockTable(indices, counts, *sizes, uneven=uneven)
    words, *means = known
    table = BlockTable(indices, counts, *sizes, BlockBits(words, kv_len), uneven)
    return table, replace(BlockMeans(*means), kv_len=kv_len)


def choose_blocks(
    scores: Tensor,
    keep: Keep,
    n_q: int,
    n_k: int,
    block_q: int = 64,
    block_k: int = 64,
    forced: Tensor | None = None,
    kv_len: int | Tensor | None = None,
    max_forced: int | None = None,
    mass: float = 0.0,
    near: Tensor | None = None,
    max_near: int | None = None,
) -> BlockTable:
    """The table of given scores: the second half of `block_table`, for any selector.

    Args:
        scores: [B, H, Mq, Mk], the higher the better; those of blocks without a valid key are not
            looked at. With a mass they are shares of the attention, which sum to one in a row.
        n_q, n_k: tokens, so Mq = ceil(n_q / block_q) and Mk = ceil(n_k / block_k).

    The other arguments, the result and what is raised are block_table's.
    """
    sizes = (block_q, block_k, n_q, n_k)
    check_parts(1, block_q, block_k)
    check_scores(scores, *sizes)
    heads, shares = scores.shape[:2], check_keep(keep, scores.shape[1])
    kept = check_kept(heads, sizes, scores.device, forced, max_forced, mass, near, max_near)
    forced, max_forced, near, max_near = kept
    length, limit = split_kv_len(kv_len, scores[:, :, :1, :1].expand(-1, -1, n_k, -1))
    indices, counts, words = tables.choose_blocks(
        scores.detach(), shares, *sizes, forced, length, limit, max_forced, float(mass), near,
        max_near,
    )  # fmt: skip
    bits = BlockBits(words, kv_len)
    return BlockTable(indices, counts, *sizes, bits, _uneven(shares, mass))


def _uneven(shares: list[float], mass: float) -> bool:
    """Whether rows are of unlike length; by forced and near blocks they hardly are."""
    return mass > 0 or min(shares) < max(shares)


def _words(k: Tensor, table: BlockTable, kv_len: int | Tensor | None) -> Tensor | None:
    """The table's bits, if it has those of this kv_len."""
    bits = table.bits
    return bits.words if bits is not None and same_len(k, bits.kv_len, kv_len) else None


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ...,
    return_lse: Literal[False] = ..., kv_len: int | Tensor | None = ...,
    precision: str | None = ...,
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ..., *,
    return_lse: Literal[True], kv_len: int | Tensor | None = ..., precision: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    return_lse: bool = False,
    kv_len: int | Tensor | None = None,
    precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query block to the key blocks that `table` gives it.

    out_i = Σ_{j∈S} e^{s_ij − LSE_i} v_j,  LSE_i = ln Σ_{j∈S} e^{s_ij},  s_ij = scale · q_i·k_j

    Args:
        q, k, v: [B, H, N_q, D], [B, H, N_k, D], [B, H, N_k, D].
        table: the block table of these lengths.
        scale: None is 1/√D.
        return_lse: also return LSE.
        kv_len: number of valid keys, int or int tensor [B]; the keys after it are never used.
        precision: None multiplies in the dtype of the inputs. "int8" rounds q and k to 8-bit
            integers and the weights and v to e4m3 (on a GPU before compute capability 8.9 these
            two stay as they are); inference only. Off the GPU it rounds q, k and v alike, to show
            the effect, and is no faster. "int8-hadamard" turns q and k by a Hadamard matrix first,
            which spreads channels that stand out and leaves the logits (arXiv 2404.00456).

    Returns [B, H, N_q, D] in the dtype and memory layout of q, and LSE [B, H, N_q] float32. A row
    with no valid key gives zeros and −inf. Raises ValueError for shapes that do not fit together.
    """
    check_qkv(q, k, v)
    check_table(q, k, table)
    length, limit = split_kv_len(kv_len, k)
    check_precision(precision, q, k, v)
    sizes = (table.block_q, table.block_k)
    run = registration.int8_attention if precision else registration.block_sparse_attention
    scale = default_scale(scale, q)
    if precision == "int8-hadamard":
        q, k, scale = rotated(q, k, scale)
    rows = (table.indices, table.counts)
    out, lse = run(q, k, v, *rows, *sizes, scale, length, limit, table.uneven)
    return (out, lse) if return_lse else out


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    feature_map: str = "softmax",
    linear: str | None = "all",
    skip: BlockTable | None = None,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """Softmax attention to the table's blocks plus projected linear attention (arXiv 2509.24006).

    O_i = O_sparse,i + φ(q_i) H Wᵀ / (φ(q_i)·Z + 1e-5) + b,  H = Σ φ(k_j)ᵀ v_j,  Z = Σ φ(k_j)

    The sums run over all keys (linear="all"), the keys outside of the table ("rest"), or those
    outside of the table and of `skip` ("marginal"). Without a weight the branch is not run and the
    result is block_sparse_attention's, bit for bit. Differentiable in q, k, v, weight and bias.

    Args:
        q, k, v: [B, H, N_q, D], [B, H, N_k, D], [B, H, N_k, D].
        table: the critical blocks.
        weight: [D, D] projection W shared by the heads, or None.
        bias: [D], or None.
        feature_map: φ over the head dimension: "softmax", "elu" (elu + 1) or "relu".
        linear: "all", "rest", "marginal" or None (no branch).
        skip: for "marginal", the blocks that neither branch reads; the table goes before it.
        scale: of the softmax branch, None is 1/√D.
        kv_len: number of valid keys, int or int tensor [B]; the keys after it are never used.

    Returns [B, H, N_q, D] in q.dtype. Raises ValueError for arguments that do not fit together.
    """
    check_qkv(q, k, v)
    check_table(q, k, table)
    check_linear(q, table, weight, bias, feature_map, linear, skip)
    given = (q, k, v, weight, bias)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)
    sizes, valid = (table.block_q, table.block_k), split_kv_len(kv_len, k)
    if weight is not None and linear == "all" and not learning:
        branch = (weight, bias, feature_map, default_scale(scale, q))
        return registration.sparse_linear_attention(
            q, k, v, table.indices, table.counts, *sizes, *branch, *valid, table.uneven
        )
    base = block_sparse_attention(q, k, v, table, scale, kv_len=kv_len)
    if weight is None:
        return base
    rows = None if linear == "all" else table
    rows = table.union(skip) if linear == "marginal" and skip is not None else rows
    indices, counts = (None, None) if rows is None else (rows.indices, rows.counts)
    arguments = (q, k, v, indices, counts, *sizes, weight, bias, feature_map, *valid)
    if learning:
        return registration.linear_branch(base, *arguments)
    registration.add_linear_branch(base, *arguments)  # no second output beside base
    return base


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense attention, and the attention to the table's key blocks.

    Args:
        q, k, v: [B, H, N_q, D], [B, H, N_k, D], [B, H, N_k, D].
        table: the window.
        scale: None is 1/√D.
        kv_len: number of valid keys, int or int tensor [B]; the keys after it are never used.

    Returns O over all keys and O over the window's, [B, H, N_q, D] in q.dtype, and their LSEs,
    [B, H, N_q] float32. Not differentiable. Raises ValueError for shapes that do not fit together.
    """
    check_qkv(q, k, v)
    check_table(q, k, table)
    length, limit = split_kv_len(kv_len, k)
    sizes = (table.block_q, table.block_k)
    return registration.window_attention(
        q, k, v, table.indices, table.counts, *sizes, default_scale(scale, q), length, limit
    )


@overload
def pooled_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ...,
    kv_len: int | Tensor | None = ..., means: BlockMeans | None = ...,
    return_lse: Literal[False] = ..., line: bool = ...,
) -> Tensor: ...  # fmt: skip


@overload
def pooled_attention(
    q: Tensor, k: Tensor, v: Tensor, table: BlockTable, scale: float | None = ...,
    kv_len: int | Tensor | None = ..., means: BlockMeans | None = ..., *,
    return_lse: Literal[True], line: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    means: BlockMeans | None = None,
    return_lse: bool = False,
    line: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention to the table's blocks; each other block is one mean key and value.

    One softmax over s_ij of the kept keys and scale · q_i·k̄_m + ln|m| of the skipped blocks m of
    |m| valid tokens, with the values v_j and v̄_m. With all blocks kept this is dense attention.

    means: those of this q, k and kv_len, from block_table with return_means; the result is the same
    without. line: with the first-order term of a skipped block (local linear attention), in which
    its values are a line of its keys; in plain torch. The other arguments, result and errors are
    those of block_sparse_attention.
    """
    check_qkv(q, k, v)
    check_table(q, k, table)
    check_means(q, k, table, means, False, kv_len)
    length, limit = split_kv_len(kv_len, k)
    sizes = (table.block_q, table.block_k, default_scale(scale, q), length, limit, table.uneven)
    known = (None if means is None else means.k, _words(k, table, kv_len))
    rows = (table.indices, table.counts)
    out, lse = registration.pooled_attention(q, k, v, *rows, *known, *sizes)
    if line:
        more = tail_line(q, k, v, table, lse, default_scale(scale, q), kv_len)
        out = (out.float() + more).to(out.dtype)
    return (out, lse) if return_lse else out


def rectified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    gapr: bool = True,
    kv_len: int | Tensor | None = None,
    means: BlockMeans | None = None,
) -> Tensor:
    """Rectified SpaAttn (arXiv 2511.19835): r_n · O_sparse + C_n for each query block n.

    a = softmax_m(scale · q̄_n·k̄_m + ln|m|), r_n = Σ a_nm over the table's blocks and those that
    the veto (gapr: |q̄_n·k̄_m| ≤ error of the means) exempts, C_n = Σ a_nm v̄_m over the others.
    Differentiable in q, k and v at the given table.

    means: those of this q, k and kv_len, from block_table with return_means and, for the veto,
    spreads; the result is the same without, and with gradients they are not used. The other
    arguments, result and errors are those of block_sparse_attention.
    """
    check_qkv(q, k, v)
    check_table(q, k, table)
    check_means(q, k, table, means, gapr, kv_len)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        out = block_sparse_attention(q, k, v, table, scale, kv_len=kv_len)
        return rectify(out, *coefficients(q, k, v, table, scale, gapr, kv_len), table.block_q)
    length, limit = split_kv_len(kv_len, k)
    sizes = (table.block_q, table.block_k, default_scale(scale, q), gapr, length, limit)
    found = [] if means is None else [means.q, means.k]
    if means is not None and gapr:
        found += [x for x in (means.q_far, means.k_far) if x is not None]
    rows, words = (table.indices, table.counts), _words(k, table, kv_len)
    return registration.rectified_attention(q, k, v, *rows, found, words, *sizes, table.uneven)
