"""Muon: momentum made orthogonal by five Newton-Schulz steps, all matrices of a shape at once.

The update's RMS is that of AdamW (0.2), arXiv 2502.16982.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor) -> Tensor:
    """Push the singular values of [B, R, C] towards one; float32 on CPU, bfloat16 on a GPU."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions; those behind the first are flattened to columns."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group["lr"], group["momentum"])

    def _update(self, params: list[nn.Parameter], lr: float, momentum: float) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p.grad)
        kept = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(kept, [p.grad for p in params], 1 - momentum)
        by_shape = defaultdict(list)
        for p, ahead in zip(
            params, torch._foreach_lerp([p.grad for p in params], kept, momentum), strict=True
        ):
            by_shape[(p.shape[0], p[0].numel())].append((p, ahead))
        for shape, rows in by_shape.items():
            updates = orthogonal(torch.stack([ahead.reshape(shape) for _, ahead in rows]))
            views = [u.view_as(p) for (p, _), u in zip(rows, updates, strict=True)]
            torch._foreach_add_([p for p, _ in rows], views, alpha=-lr * 0.2 * max(shape) ** 0.5)


def optimizers(
    named: Iterable[tuple[str, nn.Parameter]],
    matrix_lr: float,
    other_lr: float,
    keep: tuple[str, ...],
) -> list[torch.optim.Optimizer]:
    """Muon for matrices and kernels, AdamW for vectors and for names containing one of `keep`."""
    matrices, others = [], []
    for name, p in named:
        is_matrix = p.dim() >= 2 and min(p.shape[0], p[0].numel()) > 1
        plain = any(part in name for part in keep)
        (matrices if is_matrix and not plain else others).append(p)
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ]
    return [Muon(matrices, lr=matrix_lr), *made] if matrices else made
