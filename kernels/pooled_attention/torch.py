"""Pooled attention in plain torch: two attentions, joined through their LSE."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.torch import backward as sparse_backward
from dit_accel.kernels.block_sparse_attention.torch import block_sparse_attention
from dit_accel.kernels.block_table.torch import block_means, block_sizes
from dit_accel.table import BlockTable

# Bytes of scores against the means at a time.
_CHUNK_CPU, _CHUNK_OTHER = 2**21, 2**28


def pooled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
    return_lse: bool = False,
    k_mean: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.pooled_attention; k_mean [B, H, Mk, D] float32, the block means of k if known."""
    out, lse = block_sparse_attention(q, k, v, table, scale, True, kv_len)
    _Tail(q, k, v, table, scale, kv_len, k_mean).join(out, lse)
    return (out, lse) if return_lse else out


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    table: BlockTable,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: under the joint LSE the two parts are independent sums."""
    joint = (grad_out, grad_lse, q, k, v, out, lse, table, scale, kv_len)
    tail = _Tail(q, k, v, table, scale, kv_len).backward(grad_out, grad_lse, out, lse)
    dq, dk, dv = (x.add_(y) for x, y in zip(sparse_backward(*joint), tail, strict=True))
    return dq, dk, dv


class _Tail:
    """Attention of every query to the means of the blocks its row skips, with bias ln|m|."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        table: BlockTable,
        scale: float | None,
        kv_len: int | Tensor | None,
        k_mean: Tensor | None = None,
    ) -> None:
        self.q, self.table, self.n_k, self.kv_len = q, table, k.shape[2], kv_len
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        vm = block_means(v, table.block_k, kv_len)
        km = (
            block_means(k, table.block_k, kv_len) if k_mean is None else k_mean[:, :, : vm.shape[2]]
        )
        self.sizes = block_sizes(k.shape[2], table.block_k, kv_len, q.device)[..., : km.shape[2]]
        kept = table.to_mask()[..., : km.shape[2]]
        self.bias = self.sizes.log()[:, :, None].masked_fill(kept, -torch.inf)
        self.km, self.vm = km, vm

    def join(self, out: Tensor, lse: Tensor) -> None:
        """Adds this part in place to the other's output [B, H, N_q, D] and LSE [B, H, N_q]."""
        tiny = torch.finfo(torch.float32).min
        for head, means, rows in self._chunks():
            scores = self._scores(head, means, rows)
            top = torch.maximum(scores.amax(-1), lse[head][rows]).clamp_(min=tiny)
            weights = scores.sub_(top[:, None]).exp_()
            kept = (lse[head][rows] - top).exp_()
            # A row without any key has no weight at all: its zeros stay zeros, its LSE −inf.
            total = weights.sum(-1).add_(kept)
            share = total.clamp(min=1e-30).reciprocal_()[:, None]
            joint = (weights @ self.vm[head]).mul_(share)
            joint.add_(out[head][rows] * (kept[:, None] * share))
            out[head][rows], lse[head][rows] = joint, total.log_().add_(top)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this part, given the output and LSE of the whole."""
        dq = torch.empty(self.q.shape, device=self.q.device)
        dk, dv = torch.zeros_like(self.km), torch.zeros_like(self.vm)
        for head, means, rows in self._chunks():
            scores, grad = self._scores(head, means, rows), grad_out[head][rows].float()
            delta = (grad * out[head][rows].float()).sum(-1)
            delta = delta if grad_lse is None else delta - grad_lse[head][rows]
            # −inf − (−inf), in a row without any key, is not a number.
            p = (scores - lse[head][rows, None]).exp_().masked_fill_(scores == -torch.inf, 0)
            ds = p * (grad @ self.vm[head].mT - delta[:, None]) * self.scale
            dq[head][rows] = ds @ self.km[head]
            dk[head] += ds.mT @ self.q[head][rows].float()
            dv[head] += p.mT @ grad
        return dq.to(self.q.dtype), self._spread(dk), self._spread(dv)

    def _scores(self, head: tuple[int, int], blocks: slice, rows: slice) -> Tensor:
        scores = self.q[head][rows].float() @ self.km[head].mT
        bias = self.bias[head][blocks].repeat_interleave(self.table.block_q, 0)
        return scores.mul_(self.scale).add_(bias[: len(scores)])

    def _chunks(self) -> Iterator[tuple[tuple[int, int], slice, slice]]:
        """(batch, head), and the same piece of its rows in blocks and in tokens."""
        batch, heads, blocks, means = self.bias.shape
        block = self.table.block_q
        budget = _CHUNK_CPU if self.q.device.type == "cpu" else _CHUNK_OTHER
        step = max(1, budget // (4 * means * block))
        for head in product(range(batch), range(heads)):
            for first in range(0, blocks, step):
                yield head, slice(first, first + step), slice(first * block, (first + step) * block)

    def _spread(self, grad: Tensor) -> Tensor:
        """[B, H, N_k, D] in q.dtype: each token's share of the gradient of its block's mean."""
        share = grad / self.sizes.clamp(min=1)[..., None]
        tokens = share.repeat_interleave(self.table.block_k, 2)[:, :, : self.n_k]
        places = torch.arange(tokens.shape[2], device=grad.device)
        limit = self.n_k if self.kv_len is None else self.kv_len
        limit = torch.as_tensor(limit, device=grad.device).reshape(-1, 1, 1, 1)
        tokens = tokens.where(places[:, None] < limit, 0).to(self.q.dtype)
        return torch.nn.functional.pad(tokens, (0, 0, 0, self.n_k - tokens.shape[2]))
