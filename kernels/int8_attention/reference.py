"""Block-sparse attention in eight bits, naively: the kernel's roundings on dense matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.reference import token_mask
from dit_accel.table import BlockTable

# Keys that the mean is taken of, evenly spaced, and keys that share a scale.
SAMPLES, GROUP = 256, 64
_FLOOR, _LOG2E, _LN2 = 1e-12, 1.4426950408889634, 0.6931471805599453


def int8_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    return_lse: bool = False,
    kv_len: int | Tensor | None = None,
    *,
    group: int | None = None,
    values: torch.dtype = torch.float8_e4m3fn,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.block_sparse_attention with precision="int8".

    group: keys that share a scale, None is 64 or a whole smaller block. values: dtype of weights
    and values in their product.
    """
    mask = token_mask(table, kv_len)
    q2 = q.float() * (q.shape[-1] ** -0.5 if scale is None else scale) * _LOG2E
    q8, k8, v8, mean = rounded(q2, k, v, kv_len, group or min(GROUP, table.block_k), values)
    scores = (q8 @ k8.mT).masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = 448 * (scores - top).exp2()
    total = weights.sum(-1, keepdim=True)
    out = (weights.to(values).float() @ v8 / total.where(total > 0, 1)).to(q.dtype)
    lse = (top + (total / 448).log2() + (q2 * mean).sum(-1, keepdim=True))[..., 0] * _LN2
    return (out, lse) if return_lse else out


def rounded(
    q: Tensor, k: Tensor, v: Tensor, kv_len: int | Tensor | None, group: int, values: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v after rounding, as float32, and the mean [B, H, 1, D] that k has lost.

    Keys beyond kv_len are zero.
    """
    limit = torch.as_tensor(k.shape[2] if kv_len is None else kv_len, device=k.device)
    limit = limit.clamp(max=k.shape[2]).expand(k.shape[0])
    valid = (torch.arange(k.shape[2], device=k.device) < limit[:, None])[:, None, :, None]
    mean = torch.stack([_sample_mean(x.float(), int(n)) for x, n in zip(k, limit, strict=True)])
    k8 = _in_groups((k.float() - mean).where(valid, 0), group, 127, torch.int8)
    v8 = _in_groups(v.float().where(valid, 0), group, 448, values)
    step = q.abs().amax(-1, keepdim=True).clamp(min=_FLOOR) / 127
    return (q / step).round() * step, k8, v8, mean


def _sample_mean(k: Tensor, n: int) -> Tensor:
    """[H, 1, D] from k [H, N, D]: the mean of up to 256 evenly spaced keys of the first n."""
    read = k[:, : n : max(1, n // SAMPLES)][:, :SAMPLES]
    return read.sum(1, keepdim=True) / max(1, min(n, SAMPLES))


def _in_groups(x: Tensor, group: int, largest: float, dtype: torch.dtype) -> Tensor:
    """x [B, H, N, D] rounded to dtype with one scale for `group` tokens, as float32."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return x.to(dtype).float()
    n = x.shape[2]
    parts = torch.nn.functional.pad(x, (0, 0, 0, -n % group)).unflatten(2, (-1, group))
    step = parts.abs().amax((-1, -2), keepdim=True).clamp(min=_FLOOR) / largest
    if dtype == torch.int8:
        return ((parts / step).round() * step).flatten(2, 3)[:, :, :n]
    step = step.log2().ceil().exp2()
    return ((parts / step).to(dtype).float() * step).flatten(2, 3)[:, :, :n]
