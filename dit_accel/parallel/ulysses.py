"""One generation over several devices: diffusers' context parallelism, sparse methods included.

Ulysses (arXiv 2309.14509) gives each rank all tokens of some heads, so a method runs there as it
does alone. Joint models concatenate text and picture on each rank before the exchange; the tokens
then come as [text₀, picture₀, text₁, picture₁ …] and are put in order here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.machine import cached_tensors
from dit_accel.parallel import collectives
from dit_accel.parallel.context import Split, context_of
from dit_accel.pipelines.base import Geometry

if TYPE_CHECKING:
    import torch.distributed as dist
    from diffusers.models._modeling_parallel import ParallelConfig

Inner = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
Run = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def place(config: ParallelConfig) -> tuple[int, int]:
    """(rank, ranks) of this process among those that share a sequence by Ulysses."""
    import torch.distributed as dist

    context = context_of(config)
    return dist.get_rank(context._ulysses_mesh.get_group()), context.ulysses_degree or 1


def dealt(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, heads: tuple[int, ...], run: Run
) -> Tensor:
    """Run `gathered` on heads in another order, that in which they are dealt out.

    q, k, v, gate [B, N, H, D] → [B, N, H, D]; heads: all their numbers.
    """
    if heads == tuple(range(len(heads))):
        return run(q, k, v, gate)
    order, back = head_places(heads, q.device)
    q, k, v = (x.index_select(2, order) for x in (q, k, v))
    return run(q, k, v, None if gate is None else gate.index_select(2, order)).index_select(2, back)


def gathered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    config: ParallelConfig,
    geometry: Geometry,
    inner: Inner,
    gate: Tensor | None = None,
) -> Tensor:
    """Run `inner` on all tokens of this rank's heads, in the order of one device.

    q, k, v [B, N_local, H, D] → [B, N_local, H, D]; `inner` gets [B, N, H_local, D], the mask of
    all keys [B, 1, 1, N] and the gate, like q. geometry: of all ranks together.
    """
    ranks = context_of(config).ulysses_degree or 1

    def ordered(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gate: Tensor | None = None
    ) -> Tensor:
        n_text = k.shape[1] - geometry.n_visual
        if geometry.one_row or n_text <= 0 or q.shape[1] != k.shape[1]:
            return inner(q, k, v, mask, gate)
        there, back = token_places(Split.of(geometry, k.shape[1], ranks), q.device)
        mask = None if mask is None else mask.index_select(-1, there)
        gate = None if gate is None else gate.index_select(1, there)
        q, k, v = (x.index_select(1, there) for x in (q, k, v))
        out = inner(q, k, v, mask, gate)
        return out.index_select(1, back)

    even = not context_of(config).ulysses_anything
    if even and q.shape == k.shape == v.shape:
        return _exchanged(q, k, v, mask, config, ordered, gate)
    if gate is not None and (even or collectives.learned(q, k, v)):
        raise RuntimeError(
            "a gated method is trained on one device, or where heads and tokens divide"
        )
    from diffusers.models import attention_dispatch

    d = q.shape[-1]
    q = q if gate is None else torch.cat([q, gate.to(q.dtype)], -1)  # they travel together

    def forward_op(
        ctx: object,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *rest: object,
        **more: object,
    ) -> Tensor:
        return ordered(q[..., :d], k, v, mask, q[..., d:] if gate is not None else None)

    mask = _whole_mask(mask, k.shape[1], config)
    return attention_dispatch._templated_context_parallel_attention(
        q, k, v, mask, forward_op=forward_op, backward_op=None, _parallel_config=config
    )


def _whole_mask(mask: Tensor | None, n: int, config: ParallelConfig) -> Tensor | None:
    """The mask of all keys, of one of this rank's n: diffusers cuts what fills the parts up from
    the end of the whole, not from each part (0.42)."""
    import torch.distributed as dist
    from diffusers.models._modeling_parallel import gather_size_by_comm

    if mask is None or mask.shape[-1] != n:
        return mask
    group = context_of(config)._ulysses_mesh.get_group()
    sizes = gather_size_by_comm(n, group)
    mine = torch.nn.functional.pad(mask, (0, max(sizes) - n)).contiguous()
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine, group=group)
    return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)


def _exchanged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    config: ParallelConfig,
    attend: Inner,
    gate: Tensor | None,
) -> Tensor:
    """Ulysses where tokens and heads divide: exchanges by torch.distributed itself.

    diffusers makes four functional collectives, one after the other, each wrapped in a tensor of
    its own: Python that a step of a small model waits for, and one more copy. Here each of q, k and
    v is copied while the one before is sent.
    """
    import torch.distributed as dist

    context = context_of(config)
    group, ranks = context._ulysses_mesh.get_group(), context.ulysses_degree or 1
    batch, n, heads, d = q.shape

    def start(x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """[ranks, …] of what goes to each rank → what comes from each, once it is there."""
        if collectives.learned(x):
            each = [n] * ranks
            came = collectives.exchanged(x.flatten(0, 1), each, each, group)
            return came.unflatten(0, (ranks, n)), None
        x, got = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        return got, dist.all_to_all_single(got, x, group=group, async_op=True)

    parts = (batch, n, ranks, heads // ranks, d)
    sent = (q, k, v) if gate is None else (q, k, v, gate.to(q.dtype))
    begun = [start(x.reshape(parts).permute(2, 1, 0, 3, 4)) for x in sent]
    if mask is not None and mask.shape[-1] == n:
        masks = [torch.empty_like(mask) for _ in range(ranks)]
        dist.all_gather(masks, mask.contiguous(), group=group)
        mask = torch.cat(masks, -1)
    for _, work in begun:
        if work is not None:
            work.wait()
    # [ranks, n, B, H_local, D] → [B, N, H_local, D] and back
    q, k, v, *rest = (got.flatten(0, 1).transpose(0, 1) for got, _ in begun)
    out = attend(q, k, v, mask, *rest)
    got, work = start(out.transpose(0, 1).unflatten(0, (ranks, n)))
    if work is not None:
        work.wait()
    return got.permute(2, 1, 0, 3, 4).reshape(batch, n, heads, d)


@cached_tensors(256)
def head_places(heads: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [H]: the order of the heads, and what undoes it."""
    order = torch.tensor(heads, device="cpu")
    return order.to(device), order.argsort().to(device)


@cached_tensors(64)
def token_places(split: Split, device: torch.device) -> tuple[Tensor, Tensor]:
    """(there, back), int64 [N]: ordered = received[there], and back again, where the tokens of all
    processes come one after the other."""
    back = torch.cat(split.held())
    return torch.argsort(back).to(device), back.to(device)
