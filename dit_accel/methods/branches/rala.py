"""Rank-augmented linear attention (arXiv 2411.07635): keys weighed by what all queries look for, so
that the state has a higher rank, and a gate of the output from the attention's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.branches.base import Branch
from dit_accel.methods.trained import Parts, of_heads

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class RALA(Branch):
    """g_j = N·softmax_j(τ·q̄·k_j/√D) with the mean query q̄, and γ_i = x_i Mᵀ + m of the input x.

    τ of each head is 1 in the paper; training starts at 0, and M = 0, m = 1: the plain branch. The
    paper's features are elu + 1 (feature_map="elu").
    """

    name: ClassVar[str] = "rala"
    description: ClassVar[str] = "keys weighed by the mean query, and a gate of the output"
    paper: ClassVar[str] = "arXiv 2411.07635 (RALA)"
    weighs: ClassVar[bool] = True
    gated: ClassVar[bool] = True
    all_queries: ClassVar[bool] = True

    @property
    def tensors(self) -> dict[str, str]:
        return {
            "focus": "τ of each head [H]",
            "out_weight": "M, of the output's gate [H·D, C]",
            "out_bias": "m [H·D]",
        }

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        n = heads * head_dim
        gate = {"out_weight": torch.zeros(n, width), "out_bias": torch.ones(n)}
        return {"focus": torch.zeros(heads)} | gate

    def keys(self, q: Tensor, k: Tensor, call: Call, parts: Parts) -> Tensor | None:
        if "focus" not in parts:
            return None
        focus = of_heads(parts["focus"], call, q, "focus").float()
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
        mean = q.float().mean(2) * (scale * focus)[:, None]
        logits = torch.einsum("bhd,bhnd->bhn", mean, k.float())
        valid = ops.key_mask(k, call.kv_len)[..., 0]
        logits = logits.masked_fill(~valid, -torch.inf)
        return logits.softmax(-1) * valid.sum(-1, keepdim=True)

    def gate(self, hidden: Tensor, heads: int, parts: Parts) -> Tensor | None:
        if "out_weight" not in parts:
            return None
        weight, bias = parts["out_weight"].to(hidden.dtype), parts.get("out_bias")
        bias = None if bias is None else bias.to(hidden.dtype)
        return F.linear(hidden, weight, bias).unflatten(-1, (heads, -1))
