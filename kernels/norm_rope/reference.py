"""RMS norm and rotary embedding, naively: a rotation matrix for each pair of channels."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """See ops.norm_rope; computed in `dtype`, or in float32."""
    wide = dtype or torch.float32
    made = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = x.to(wide)
        if weight is not None:
            y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(wide)
        y = y.unflatten(2, (heads, -1, 2))[..., None]
        c, s = cos[..., 0::2].to(wide), sin[..., 1::2].to(wide)
        turn = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
        y = (turn @ y).squeeze(-1).flatten(-2)
        made.append(y if dtype else y.to(x.dtype))
    return made[0], made[1]
