"""The feature maps φ of linear attention, and their derivatives."""

from __future__ import annotations

import torch
from torch import Tensor

FEATURE_MAPS = ("softmax", "elu", "relu")

# Added to φ(q)·Z: a query whose features meet no key's gives zeros instead of 0/0.
EPS = 1e-5


def features(x: Tensor, name: str) -> Tensor:
    """φ(x) over the last dimension: softmax(x), elu(x) + 1 or relu(x)."""
    if name == "softmax":
        return x.softmax(-1)
    return torch.nn.functional.elu(x) + 1 if name == "elu" else x.relu()


def features_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    """The gradient of x for `grad`, that of φ(x)."""
    if name == "softmax":
        y = x.softmax(-1)
        return y * (grad - (grad * y).sum(-1, keepdim=True))
    return grad * (x.clamp(max=0).exp() if name == "elu" else x > 0)


def key_share(k: Tensor, kv_len: int | Tensor | None) -> float:
    """What the sums over all keys are multiplied by to fit 16 bits, ε too: it cancels. 1/n of the n
    valid keys, or of all where a tensor tells their number."""
    n = k.shape[2] if kv_len is None or isinstance(kv_len, Tensor) else min(k.shape[2], kv_len)
    return 1 / max(1, n)


def key_mask(k: Tensor, kv_len: int | Tensor | None) -> Tensor:
    """[B or 1, 1, N_k, 1] bool: the keys that count."""
    n = k.shape[2]
    limit = torch.as_tensor(n if kv_len is None else kv_len, device=k.device)
    return torch.arange(n, device=k.device)[:, None] < limit.reshape(-1, 1, 1, 1)
