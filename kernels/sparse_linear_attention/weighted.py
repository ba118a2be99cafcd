"""Linear attention whose keys and pairs of blocks have weights, in plain torch, on any device.

    H_n = Σ_m w_nm Σ_{j∈m} g_j φ(k_j)ᵀ v_j,   Z_n = Σ_m w_nm Σ_{j∈m} g_j φ(k_j)
    O_i = φ(q_i) H_n / (φ(q_i)·Z_n + ε),   or   φ(q_i) H_n / rms(φ(q_i) H_n)

Autograd differentiates it. Heads go one by one: states of blocks are D² numbers for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.sparse_linear_attention.features import EPS, features, key_mask


def weighted_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "softmax",
    keys: Tensor | None = None,
    blocks: Tensor | None = None,
    sizes: tuple[int, int] = (64, 64),
    rms: bool = False,
    kv_len: int | Tensor | None = None,
) -> Tensor:
    """See ops.weighted_linear_attention."""
    valid = key_mask(k, kv_len)
    k, v = k.where(valid, 0), v.where(valid, 0)
    weights = valid.float() if keys is None else keys[..., None].float() * valid
    weights = weights.expand(*k.shape[:3], 1)
    pairs = None if blocks is None else blocks.expand(*q.shape[:2], *blocks.shape[2:])
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            fq, fk = (features(x[b, h].float(), feature_map) for x in (q, k))
            fk, fv = fk * weights[b, h], v[b, h].float()
            fv = fv if rms else torch.cat([fv, torch.ones_like(fv[:, :1])], 1)
            w = None if pairs is None else pairs[b, h].float()
            rows.append(normalised(_products(fq, fk, fv, w, sizes), rms))
    return torch.stack(rows).view(*q.shape[:3], v.shape[3])


def _products(
    fq: Tensor, fk: Tensor, fv: Tensor, w: Tensor | None, sizes: tuple[int, int]
) -> Tensor:
    """φ(q_i) H_n [N_q, …] of one head; w [Mq, Mk] or None."""
    if w is None:
        return fq @ (fk.mT @ fv)
    states = _split(fk, sizes[1]).mT @ _split(fv, sizes[1])
    held = (w @ states.flatten(1)).view(w.shape[0], *states.shape[1:])
    return (_split(fq, sizes[0]) @ held).flatten(0, 1)[: fq.shape[0]]


def normalised(x: Tensor, rms: bool) -> Tensor:
    """x over its root mean square, or its first columns over the last one."""
    if rms:
        return x * (x.square().mean(-1, keepdim=True) + EPS**2).rsqrt()
    return x[:, :-1] / (x[:, -1:] + EPS)


def _split(x: Tensor, block: int) -> Tensor:
    """[M, block, …] from x [N, …], padded with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % block)).unflatten(0, (-1, block))
