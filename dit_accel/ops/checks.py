"""What the operators refuse, each in one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.table import BlockMeans, BlockTable, Keep, block_count

PRECISIONS = (None, "int8", "int8-hadamard")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "q is [B, H, N_q, D], k and v are [B, H, N_k, D], not "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or 0 in (q.shape[2], k.shape[2]):
        raise ValueError(
            "q and k share B, H and D and hold at least one token, unlike "
            f"{tuple(q.shape)} and {tuple(k.shape)}; repeat grouped heads first"
        )
    if not q.is_floating_point() or len({q.dtype, k.dtype, v.dtype}) > 1:
        raise ValueError(
            f"q, k and v share one floating dtype, unlike {q.dtype}, {k.dtype} and {v.dtype}"
        )


def check_table(q: Tensor, k: Tensor, table: BlockTable) -> None:
    if not isinstance(table, BlockTable):
        raise TypeError(f"table is a BlockTable, not {type(table).__name__}; see ops.block_table")
    given, wanted = (table.n_q, table.n_k), (q.shape[2], k.shape[2])
    if given != wanted or table.counts.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"the table serves (N_q, N_k) = {given} and (B, H) = {tuple(table.counts.shape[:2])}, "
            f"but q and k have {wanted} and {tuple(q.shape[:2])}; build it from these tensors"
        )


def check_means(
    q: Tensor,
    k: Tensor,
    table: BlockTable,
    means: BlockMeans | None,
    spreads: bool,
    kv_len: int | Tensor | None,
) -> None:
    if means is None:
        return
    if not isinstance(means, BlockMeans):
        raise TypeError(
            f"means are BlockMeans, not {type(means).__name__}; see return_means of ops.block_table"
        )
    heads, d = q.shape[:2], q.shape[3]
    wanted = (*heads, table.query_blocks, d), (*heads, table.key_blocks, d)
    if (means.q.shape, means.k.shape) != wanted:
        raise ValueError(
            f"the means of q and k have shapes {list(wanted[0])} and {list(wanted[1])}, not "
            f"{list(means.q.shape)} and {list(means.k.shape)}; take those made with the table"
        )
    if spreads and means.q_far is None:
        raise ValueError(
            "the veto reads mean deviations, which these means lack; call block_table with "
            "spreads=True, or this with gapr=False"
        )
    if not same_len(k, means.kv_len, kv_len):
        raise ValueError(
            "the means were made with another kv_len; give block_table and this the same int or "
            "the same tensor"
        )


def same_len(k: Tensor, made: int | Tensor | None, given: int | Tensor | None) -> bool:
    """Whether two kv_len of k are known to be the same."""
    whole = [None if not isinstance(n, Tensor) and n == k.shape[2] else n for n in (made, given)]
    tensors = any(isinstance(n, Tensor) for n in whole)
    return whole[0] is whole[1] or not (tensors or whole[0] != whole[1])


def check_precision(precision: str | None, *tensors: Tensor) -> None:
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision is 'int8', 'int8-hadamard' or None (that of the inputs), not {precision!r}"
        )
    if precision and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            f"precision={precision!r} is for inference and has no gradient: train with "
            "precision=None, or call it under torch.no_grad()"
        )


def check_linear(
    q: Tensor,
    table: BlockTable,
    weight: Tensor | None,
    bias: Tensor | None,
    feature_map: str,
    linear: str | None,
    skip: BlockTable | None,
) -> None:
    if linear not in ("all", "rest", "marginal", None):
        raise ValueError(f"linear is 'all', 'rest', 'marginal' or None, not {linear!r}")
    if feature_map not in ("softmax", "elu", "relu"):
        raise ValueError(f"feature_map is 'softmax', 'elu' or 'relu', not {feature_map!r}")
    d = q.shape[3]
    for name, x, shape in (("weight", weight, (d, d)), ("bias", bias, (d,))):
        if x is not None and (linear is None or x.shape != shape):
            raise ValueError(
                f"{name} is {list(shape)} and goes with a linear branch, "
                f"not {list(x.shape)} with linear={linear!r}"
            )
    if bias is not None and weight is None:
        raise ValueError("a bias goes with a weight: give both or neither")
    if weight is None or linear != "marginal":
        return
    if skip is None:
        raise ValueError("linear='marginal' needs `skip`, the table of the blocks to leave out")
    other = (skip.counts.shape, skip.block_q, skip.block_k, skip.n_k)
    if other != (table.counts.shape, table.block_q, table.block_k, table.n_k):
        raise ValueError("`skip` has the shape and block sizes of the table: build both from q, k")


def check_keep(keep: Keep, heads: int) -> list[float]:
    """The shares of the heads, or the one of all."""
    shares = keep if isinstance(keep, tuple) else (keep,)
    if len(shares) not in (1, heads):
        raise ValueError(f"keep has one share for each of {heads} heads, not {len(shares)}")
    for share in shares:
        if isinstance(share, bool) or not 0 < share <= 1:
            raise ValueError(f"keep is a share of the key blocks in (0, 1], not {share}")
    return [float(share) for share in shares]


def check_parts(parts: int, block_q: int, block_k: int) -> None:
    if min(block_q, block_k) < 1:
        raise ValueError(f"a block holds at least one token, not {min(block_q, block_k)}")
    if parts < 1 or parts & (parts - 1) or block_q % parts or block_k % parts:
        raise ValueError(
            f"parts is a power of two that divides blocks of {block_q} and {block_k} tokens, "
            f"not {parts}"
        )


def check_scores(scores: Tensor, block_q: int, block_k: int, n_q: int, n_k: int) -> None:
    blocks = block_count(n_q, block_q), block_count(n_k, block_k)
    if scores.dim() != 4 or scores.shape[2:] != blocks or not scores.is_floating_point():
        raise ValueError(
            f"scores are floating-point [B, H, {blocks[0]}, {blocks[1]}] for {n_q} queries and "
            f"{n_k} keys in blocks of {block_q} and {block_k}, not {list(scores.shape)} of "
            f"{scores.dtype}"
        )


def check_kept(
    heads: torch.Size,
    sizes: tuple[int, int, int, int],
    device: torch.device,
    forced: Tensor | None,
    max_forced: int | None,
    mass: float,
    near: Tensor | None,
    max_near: int | None,
) -> tuple[Tensor | None, int | None, Tensor | None, int]:
    """forced, max_forced, near [Mq, Mk] and max_near of a table with these (B, H) and sizes
    (block_q, block_k, N_q, N_k)."""
    blocks = block_count(sizes[2], sizes[0]), block_count(sizes[3], sizes[1])
    if not 0 <= mass < 1:
        raise ValueError(f"mass is a share of the attention in [0, 1), not {mass}")
    if forced is not None:
        forced, max_forced = check_forced(forced, max_forced, (*heads, *blocks), device)
    if near is not None:
        near, max_near = check_forced(near, max_near, blocks, device, "near", "[Mq, Mk]")
        near = near.expand(blocks)
    return forced, max_forced, near, max_near or 0


def check_forced(
    forced: Tensor,
    max_forced: int | None,
    shape: tuple[int, ...],
    device: torch.device,
    name: str = "forced",
    sizes: str = "[B, H, Mq, Mk]",
) -> tuple[Tensor, int]:
    if forced.dtype != torch.bool:
        raise ValueError(f"{name} is a bool tensor, not {forced.dtype}")
    try:
        torch.broadcast_to(forced, shape)
    except RuntimeError:
        raise ValueError(
            f"{name} broadcasts to {sizes} = {list(shape)}, unlike {list(forced.shape)}"
        ) from None
    if max_forced is None:
        known = forced.device.type == "cpu" and not torch.compiler.is_compiling()
        per_row = forced.expand(*forced.shape[:-1], shape[-1]).sum(-1) if known else None
        max_forced = shape[-1] if per_row is None else int(per_row.max())
    return forced.to(device), max_forced


def split_kv_len(kv_len: int | Tensor | None, k: Tensor) -> tuple[Tensor | None, int | None]:
    """kv_len as the two op arguments: a tensor [B] or an int, the other one None."""
    if isinstance(kv_len, Tensor):
        if kv_len.is_floating_point() or kv_len.shape != k.shape[:1]:
            raise ValueError(
                f"a kv_len tensor is [B] = [{k.shape[0]}] of integers, not {list(kv_len.shape)} "
                f"of {kv_len.dtype}"
            )
        return kv_len.to(k.device), None
    if kv_len is None or kv_len == k.shape[2]:
        return None, None
    if not 1 <= kv_len < k.shape[2]:
        raise ValueError(f"kv_len lies between 1 and N_k = {k.shape[2]}, not {kv_len}")
    return None, kv_len


def default_scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
