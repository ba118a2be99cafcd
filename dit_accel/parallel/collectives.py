"""Tokens sent among processes, and their gradients on the way back: the adjoint of each exchange.

A loss is that of all processes together: each makes its own tokens' part of every gradient, and the
sum over the processes is the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import torch.distributed as dist


def exchanged(x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    """x [n, …] in the order of the receivers → [n', …] in that of the senders, of which each sends
    and gets as many as these say."""
    if learned(x):
        return _Exchanged.apply(x, sent, got, group)
    return _exchange(x, sent, got, group)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [n, …] of each process → [P·n, …] of all; its gradient is the sum of all processes'."""
    return _Gathered.apply(x, group)


def learned(*tensors: Tensor) -> bool:
    """Are gradients of any of these wanted?"""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _exchange(x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup) -> Tensor:
    import torch.distributed as dist

    x = x.contiguous()
    came = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(came, x, got, sent, group=group)
    return came


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], got: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.way = got, sent, group
        return _exchange(x, sent, got, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, *ctx.way), None, None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        import torch.distributed as dist

        ctx.group, ctx.ranks = group, dist.get_world_size(group)
        x = x.contiguous()
        whole = x.new_empty(ctx.ranks * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(whole, x, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        each = [grad.shape[0] // ctx.ranks] * ctx.ranks  # by what gloo has, too
        parts = _exchange(grad, each, each, ctx.group)
        return parts.unflatten(0, (ctx.ranks, each[0])).sum(0), None
