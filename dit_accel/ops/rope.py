"""The norm and rotary embedding of queries and keys as one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.norm_rope import torch as plain
from dit_accel.ops import dispatch


def norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMS norm over the channels of all heads (arXiv 1910.07467), then the rotary embedding of each
    pair of channels (arXiv 2104.09864).

    y = w ∘ x / √(mean(x²) + eps), then (y_2i, y_2i+1) turned by the angle of (cos_2i, sin_2i+1)

    Args:
        q, k: [B, N, H · D], any strides, one of float32, float16 and bfloat16.
        cos, sin: [1 or B, N, 1, D], each value twice, as diffusers' rotary embeddings are with
            repeat_interleave; of any floating dtype.
        heads: H.
        q_weight, k_weight: [H · D]; None leaves out the norm.
        eps: of the norm.

    Returns q and k [B, N, H, D], contiguous, in their dtype; sums and products in float32, rounded
    to the dtype after the norm. Differentiable. Raises ValueError for shapes that do not fit.
    """
    _check(q, k, cos, sin, heads, q_weight, k_weight)
    given = (q, k, cos, sin, heads, q_weight, k_weight, eps)
    tensors = (q, k, q_weight, k_weight)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return plain.norm_rope(*given)
    return _norm_rope(*given)


def _check(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> None:
    if q.dim() != 3 or k.shape != q.shape or k.dtype != q.dtype or q.shape[2] % (2 * heads):
        raise ValueError(
            f"q and k are both [B, N, H · D] of one dtype with {heads} heads of an even D, not "
            f"{list(q.shape)} {q.dtype} and {list(k.shape)} {k.dtype}"
        )
    rows, channels = (q.shape[1], 1, q.shape[2] // heads), q.shape[2]
    if cos.shape != sin.shape or cos.shape[1:] != rows or cos.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"cos and sin are [1 or {q.shape[0]}, {rows[0]}, 1, {rows[2]}] (1 or B, N, 1, D), not "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )
    for weight in (q_weight, k_weight):
        if weight is not None and weight.shape != (channels,):
            raise ValueError(f"a weight is [{channels}], not {list(weight.shape)}")


@torch.library.custom_op("dit_accel::norm_rope", mutates_args=())
def _norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    fn = dispatch.select("norm_rope", q, heads=heads).fn
    return fn(q, k, cos, sin, heads, q_weight, k_weight, eps)


@_norm_rope.register_fake
def _(q, k, cos, sin, heads, *rest):
    shape = (*q.shape[:2], heads, q.shape[2] // heads)
    return q.new_empty(shape), k.new_empty(shape)
