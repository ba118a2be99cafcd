"""Queries and keys turned by a Hadamard matrix before they are rounded to eight bits.

(q·R)·(k·R) = q·k for R·Rᵀ = 1. A channel that stands out, which alone would set the scale of its
whole row, is spread over all of them, as QuaRot does for weights and activations (arXiv
2404.00456).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.machine import cached_tensors


@cached_tensors(64)
def hadamard(
    d: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """R [d, d] with entries 0 and ±2^-n, exact in every dtype, and c in R·Rᵀ = c·1.

    Sylvester's matrix of the largest power of two that divides d, once for each part of d.
    """
    size = d & -d
    part, n = torch.ones(1, 1), size.bit_length() - 1
    for _ in range(n):
        part = torch.cat([torch.cat([part, part], 1), torch.cat([part, -part], 1)])
    whole = torch.block_diag(*[part * 2.0 ** -(n // 2)] * (d // size))
    return whole.to(device, dtype), 2.0 ** (n % 2)


def rotated(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """q·R and k·R [B, H, N, D] in the dtype and layout of q and k, and the scale that goes with
    them: the logits are what they were."""
    turn, grown = hadamard(q.shape[-1], q.dtype, q.device)
    return _turned(q, turn), _turned(k, turn), scale / grown


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x @ turn)
