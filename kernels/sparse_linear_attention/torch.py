"""Sparse-linear attention in plain torch, on any device: one state per block, summed per row.

    h_m = φ(K_m)ᵀ V_m,  z_m = Σ_{j∈m} φ(k_j),  H_n = Σ_{m∉excluded(n)} h_m,  Z_n = Σ z_m
    O_i = base_i + φ(q_i)(H_n Wᵀ) / (φ(q_i)·Z_n + ε) + b

States are summed over the blocks they hold, never subtracted from a total: what is left of a row
that excludes almost everything keeps its precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.block_sparse_attention.torch import block_sparse_attention
from dit_accel.kernels.sparse_linear_attention.features import (
    EPS,
    features,
    features_backward,
    key_mask,
)
from dit_accel.table import BlockTable


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: BlockTable,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    feature_map: str = "softmax",
    excluded: BlockTable | None = None,
    scale: float | None = None,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """See ops.sparse_linear_attention; `excluded` as in `linear_branch`."""
    base = block_sparse_attention(q, k, v, table, scale, kv_len=kv_len)
    if weight is None:
        return base
    return linear_branch(base, q, k, v, excluded, weight, bias, feature_map, kv_len)


def linear_branch(
    base: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded: BlockTable | None,
    weight: Tensor,
    bias: Tensor | None = None,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """base plus the projected linear attention over all key blocks but `excluded`'s (None: all).

    base, q [B, H, N_q, D], k, v [B, H, N_k, D], weight [D, D], bias [D] or None.
    into: where the result goes.
    """
    out = torch.empty(q.shape, device=q.device)
    w = weight.float().mT
    for head in _heads(q, k, v, excluded, feature_map, kv_len):
        state, total = head.states()
        branch = head.fq @ (state @ w) / (head.fq @ total[..., None] + EPS)
        head.put(out, branch)
    if bias is not None:
        out += bias.float()
    out = out.add_(base).to(base.dtype)
    return out if into is None else into.copy_(out)


def linear_branch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded: BlockTable | None,
    weight: Tensor,
    feature_map: str = "softmax",
    kv_len: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dW of `linear_branch` (base's gradient is grad, that of bias its sum).

    With a = φ(q)/(φ(q)·Z + ε), u = aH, dU = dO W, δ = rowsum(dU ∘ u):
    dH = aᵀ dU, dZ = −aᵀ δ, dφ(q) = (dU Hᵀ − δ Zᵀ)/(φ(q)·Z + ε);
    per key block, over the rows that hold it: dφ(k) = v dHᵀ + dZ, dv = φ(k) dH.
    """
    dq, dk, dv = (torch.empty(x.shape, device=x.device) for x in (q, k, v))
    w, dw = weight.float(), torch.zeros(weight.shape, device=weight.device)
    for head in _heads(q, k, v, excluded, feature_map, kv_len):
        state, total = head.states()
        g = head.rows(grad)
        den = head.fq @ total[..., None] + EPS
        a = head.fq / den
        u, du = a @ state, g @ w
        delta = (du * u).sum(-1, keepdim=True)
        dw += torch.einsum("mik,mij->kj", g, u)
        head.put(dq, (du @ state.mT - delta * total[:, None]) / den)
        d_state, d_total = head.spread(a.mT @ du), head.spread(-(a * delta).sum(1))
        head.put(dk, head.v @ d_state.mT + d_total[:, None])
        head.put(dv, head.fk @ d_state)
    valid = key_mask(k, kv_len)
    dq = features_backward(dq, q.float(), feature_map)
    dk = features_backward(dk.where(valid, 0), k.float().where(valid, 0), feature_map)
    return dq.to(q.dtype), dk.to(k.dtype), dv.where(valid, 0).to(v.dtype), dw.to(weight.dtype)


class _Head(NamedTuple):
    """One head in blocks: fq [Mq, bq, D], fk and v [Mk, bk, D], held [Mq, Mk], all float32."""

    at: tuple[int, int]
    fq: Tensor
    fk: Tensor
    v: Tensor
    held: Tensor

    def states(self) -> tuple[Tensor, Tensor]:
        """H [Mq, D, D] and Z [Mq, D]."""
        blocks = self.fk.mT @ self.v
        return _sum(self.held, blocks), self.held @ self.fk.sum(1)

    def spread(self, x: Tensor) -> Tensor:
        """[Mk, …]: the sum of x [Mq, …] over the rows that hold each key block."""
        return _sum(self.held.mT, x)

    def rows(self, x: Tensor) -> Tensor:
        """This head of x [B, H, N_q, D] in query blocks."""
        return _split(x[self.at].float(), self.fq.shape[1])

    def put(self, out: Tensor, blocks: Tensor) -> None:
        """Write blocks [M, b, D] to this head of out [B, H, N, D]."""
        out[self.at] = blocks.flatten(0, 1)[: out.shape[2]]


def _heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    excluded: BlockTable | None,
    feature_map: str,
    kv_len: int | Tensor | None,
) -> Iterator[_Head]:
    """The heads one by one: their states are D² numbers for each block."""
    block_q, block_k = q.shape[2], k.shape[2]
    held = torch.ones(1, 1, 1, 1, device=q.device)
    if excluded is not None:
        block_q, block_k = excluded.block_q, excluded.block_k
        held = (~excluded.to_mask()).float()
    held = held.expand(*q.shape[:2], *held.shape[2:])
    valid = key_mask(k, kv_len).expand(q.shape[0], 1, -1, 1)
    for at in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        here = valid[at[0], 0]
        fk = features(k[at].float(), feature_map).where(here, 0)
        fv = v[at].float().where(here, 0)
        fq = features(q[at].float(), feature_map)
        yield _Head(at, _split(fq, block_q), _split(fk, block_k), _split(fv, block_k), held[at])


def _split(x: Tensor, block: int) -> Tensor:
    """[M, block, D] from x [N, D], padded with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % block)).unflatten(0, (-1, block))


def _sum(held: Tensor, x: Tensor) -> Tensor:
    """held [M, M'] times x [M', …]."""
    return (held @ x.flatten(1)).view(held.shape[0], *x.shape[1:])
