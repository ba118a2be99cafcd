"""RMS norm and rotary embedding in plain torch: a product of complex numbers. Differentiable."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
) -> tuple[Tensor, Tensor]:
    """See ops.norm_rope."""
    turn = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
    return _turned(q, turn, heads, q_weight, eps), _turned(k, turn, heads, k_weight, eps)


def _turned(x: Tensor, turn: Tensor, heads: int, weight: Tensor | None, eps: float) -> Tensor:
    y = x if weight is None else F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
    y = y.float().contiguous().unflatten(2, (heads, -1, 2))
    return torch.view_as_real(torch.view_as_complex(y) * turn).flatten(-2).to(x.dtype)
