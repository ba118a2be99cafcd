"""Linear attention with weights, for the branches of fine-tuned methods."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.sparse_linear_attention import weighted
from dit_accel.kernels.sparse_linear_attention.features import FEATURE_MAPS
from dit_accel.ops import registration
from dit_accel.ops.checks import check_qkv, check_table, split_kv_len
from dit_accel.table import BlockTable, block_count


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    feature_map: str = "softmax",
    excluded: BlockTable | None = None,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """O_i = φ(q_i) H Wᵀ / (φ(q_i)·Z + 1e-5), the linear branch of `sparse_linear_attention` alone,
    by the same kernels.

    Args:
        q, k, v: [B, H, N_q, D], [B, H, N_k, D], [B, H, N_k, D].
        weight: [D, D] projection W shared by the heads; None is 1.
        feature_map: φ over the head dimension: "softmax", "elu" (elu + 1) or "relu".
        excluded: blocks whose keys the sums leave out, or None.
        kv_len: number of valid keys, int or int tensor [B]; the keys after it are never used.

    Returns [B, H, N_q, D] in q.dtype. Differentiable in q, k, v and weight. Raises ValueError for
    arguments that do not fit together.
    """
    check_qkv(q, k, v)
    _check_features(feature_map)
    d = q.shape[3]
    if weight is not None and weight.shape != (d, d):
        raise ValueError(f"weight is [{d}, {d}], not {list(weight.shape)}")
    weight = torch.eye(q.shape[3], device=q.device) if weight is None else weight
    indices, counts, sizes = None, None, (64, 64)
    if excluded is not None:
        check_table(q, k, excluded)
        indices, counts = excluded.indices, excluded.counts
        sizes = (excluded.block_q, excluded.block_k)
    valid, base = split_kv_len(kv_len, k), torch.zeros_like(q)
    arguments = (q, k, v, indices, counts, *sizes, weight, None, feature_map, *valid)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, weight)):
        return registration.linear_branch(base, *arguments)
    registration.add_linear_branch(base, *arguments)
    return base


def weighted_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "softmax",
    keys: Tensor | None = None,
    blocks: Tensor | None = None,
    sizes: tuple[int, int] = (64, 64),
    rms: bool = False,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """Linear attention of q to keys of weight g, from query blocks n to key blocks m of weight w.

    O_i = φ(q_i) H_n / (φ(q_i)·Z_n + 1e-5),  H_n = Σ_m w_nm Σ_{j∈m} g_j φ(k_j)ᵀ v_j, Z_n likewise.
    In plain torch, on any device: no kernel takes weights. Differentiable in every tensor.

    Args:
        q, k, v: [B, H, N_q, D], [B, H, N_k, D], [B, H, N_k, D].
        feature_map: φ over the head dimension: "softmax", "elu" (elu + 1) or "relu".
        keys: g ≥ 0, broadcastable to [B, H, N_k]; None is 1.
        blocks: w ≥ 0, broadcastable to [B, H, Mq, Mk]; None is 1.
        sizes: tokens in a query and in a key block.
        rms: divide by the root mean square of φ(q_i) H_n over D instead (arXiv 2210.10340).
        kv_len: number of valid keys, int or int tensor [B]; the keys after it are never used.

    Returns [B, H, N_q, D] float32. Raises ValueError for arguments that do not fit together.
    """
    check_qkv(q, k, v)
    _check_features(feature_map)
    heads, n, m = q.shape[:2], q.shape[2], k.shape[2]
    _check("keys", keys, (*heads, m))
    _check("blocks", blocks, (*heads, block_count(n, sizes[0]), block_count(m, sizes[1])))
    return weighted.weighted_linear_attention(
        q, k, v, feature_map, keys, blocks, sizes, rms, kv_len
    )


def _check_features(feature_map: str) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map is one of {', '.join(FEATURE_MAPS)}, not {feature_map!r}")


def over_rms(x: Tensor) -> Tensor:
    """x over its root mean square in the last dimension, float32; 0 where x is."""
    return weighted.normalised(x.float(), True)


def _check(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """ValueError unless x broadcasts to shape in its first two dimensions."""
    if x is None:
        return
    fits = x.dim() == len(shape) and x.shape[2:] == shape[2:]
    if not fits or any(a not in (1, b) for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(f"the weights of {name} are {list(shape)}, not {list(x.shape)}")
