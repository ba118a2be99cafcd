"""Pooled attention in plain torch: two attentions, joined through their LSE."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.torch import (
    as_blocks,
    as_tokens,
    block_sparse_attention,
)
from dit_accel.kernels.block_sparse_attention.torch import backward as sparse_backward
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
) -> Tensor | tuple[Tensor, Tensor]:
    """See ops.pooled_attention."""
    out, lse = block_sparse_attention(q, k, v, table, scale, True, kv_len)
    tail = _Tail(q, k, v, table, scale, kv_len)
    tail_out, tail_lse = tail.attend()
    total = torch.logaddexp(lse, tail_lse)
    # A row without any key has −inf on both sides; what counts is that its zeros stay zeros.
    finite = total.clamp(min=torch.finfo(torch.float32).min)
    left, right = ((x - finite).exp()[..., None] for x in (lse, tail_lse))
    out = (out * left).add_(tail_out.mul_(right)).to(q.dtype)
    return (out, total) if return_lse else out


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
    return tuple(x.add_(y) for x, y in zip(sparse_backward(*joint), tail, strict=True))


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
    ) -> None:
        self.q, self.table, self.n_k, self.kv_len = q, table, k.shape[2], kv_len
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        km, vm = (block_means(x, table.block_k, kv_len) for x in (k, v))
        self.sizes = block_sizes(k.shape[2], table.block_k, kv_len, q.device)[..., : km.shape[2]]
        kept = table.to_mask()[..., : km.shape[2]]
        bias = self.sizes.log()[:, :, None].masked_fill(kept, -torch.inf)
        self.km, self.vm, self.bias = (x.flatten(0, 1) for x in (km, vm, bias))

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output [B, H, N_q, D] and LSE [B, H, N_q], float32; 0 and −inf if nothing is skipped."""
        queries = self._split(self.q)
        out = torch.empty_like(queries, dtype=torch.float32)
        lse = torch.empty_like(out[..., 0])
        for head, rows in self._chunks():
            scores = self._scores(queries, head, rows)
            top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            out[head, rows] = weights @ self.vm[head] / total.clamp(min=1e-30)
            lse[head, rows] = (total.log() + top)[..., 0]
        return self._join(out), self._join(lse)

    def backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of this part, given the output and LSE of the whole."""
        delta = (grad_out.float() * out.float()).sum(-1)
        delta = delta if grad_lse is None else delta - grad_lse
        queries, grads = self._split(self.q), self._split(grad_out)
        delta, lse = self._split(delta[..., None]), self._split(lse[..., None])
        dq = torch.empty_like(queries, dtype=torch.float32)
        dk, dv = torch.zeros_like(self.km), torch.zeros_like(self.vm)
        for head, rows in self._chunks():
            scores = self._scores(queries, head, rows)
            # −inf − (−inf), in a row without any key, is not a number.
            p = (scores - lse[head, rows]).exp_().masked_fill_(scores == -torch.inf, 0)
            grad = grads[head, rows].float()
            ds = p * (grad @ self.vm[head].mT - delta[head, rows]) * self.scale
            dq[head, rows] = ds @ self.km[head]
            dk[head] += (ds.mT @ queries[head, rows].float()).sum(0)
            dv[head] += (p.mT @ grad).sum(0)
        return self._join(dq).to(self.q.dtype), self._spread(dk), self._spread(dv)

    def _scores(self, queries: Tensor, head: int, rows: slice) -> Tensor:
        scores = queries[head, rows].float() @ self.km[head].mT
        return scores.mul_(self.scale).add_(self.bias[head, rows, None])

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        heads, blocks, means = self.bias.shape
        budget = _CHUNK_CPU if self.q.device.type == "cpu" else _CHUNK_OTHER
        step = max(1, budget // (4 * means * self.table.block_q))
        for head in range(heads):
            for first in range(0, blocks, step):
                yield head, slice(first, first + step)

    def _split(self, x: Tensor) -> Tensor:
        """[B·H, Mq, block_q, …] from [B, H, N_q, …]."""
        blocks = as_blocks(x, self.table.block_q)
        return blocks.unflatten(0, (self.bias.shape[0], -1))

    def _join(self, x: Tensor) -> Tensor:
        """The reverse of `_split`."""
        return as_tokens(x.flatten(0, 1), (*self.q.shape[:3], *x.shape[3:]))

    def _spread(self, grad: Tensor) -> Tensor:
        """[B, H, N_k, D] in q.dtype: each token's share of the gradient of its block's mean."""
        batch, heads, _, d = self.q.shape
        share = grad.view(batch, heads, -1, d) / self.sizes.clamp(min=1)[..., None]
        tokens = share.repeat_interleave(self.table.block_k, 2)[:, :, : self.n_k]
        places = torch.arange(tokens.shape[2], device=grad.device)
        limit = self.n_k if self.kv_len is None else self.kv_len
        limit = torch.as_tensor(limit, device=grad.device).reshape(-1, 1, 1, 1)
        tokens = tokens.where(places[:, None] < limit, 0).to(self.q.dtype)
        return torch.nn.functional.pad(tokens, (0, 0, 0, self.n_k - tokens.shape[2]))
