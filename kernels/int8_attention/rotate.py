"""Queries and keys turned by a Hadamard matrix before they are rounded to eight bits.

(q·R)·(k·R) = q·k for R·Rᵀ = 1. A channel that stands out, which alone would set the scale of its
whole row, is spread over all of them, as QuaRot does for weights and activations (arXiv
2404.00456).
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(
    d: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """R [d, d] with entries 0 and ±2^-n, exact in every dtype, and c in R·Rᵀ = c·1.

    Sylvester's matrix of the largest power of two that divides d, up to 256, once for each part of
    d: an entry is negative where its row and column have an odd number of bits in common.
    """
    size = min(d & -d, 256)
    n, o = size.bit_length() - 1, torch.arange(d, device=device)
    bits = o[:, None] & o[None, :] & (size - 1)
    for shift in (4, 2, 1):
        bits = bits ^ (bits >> shift)
    signs = 1 - 2 * (bits & 1)
    here = o[:, None] // size == o[None, :] // size
    return (here * signs).to(dtype) * 2.0 ** -(n // 2), 2.0 ** (n % 2)


def rotated(q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """q·R and k·R [B, H, N, D] in the dtype and layout of q and k, and the scale that goes with
    them: the logits are what they were."""
    turn, grown = hadamard(q.shape[-1], q.dtype, q.device)
    return _turned(q, turn), _turned(k, turn), scale / grown


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(x @ turn)
