"""A gate for each key: Gated Linear Attention (arXiv 2312.06635), whose gates come from the token
and fade the state in time; without a time, each weighs its own key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dit_accel.methods.branches.base import Branch
from dit_accel.methods.trained import Parts, of_heads

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Gated(Branch):
    """g_j = 2·sigmoid(k_j·u + c), u and c of each head; u = c = 0 is the plain branch."""

    name: ClassVar[str] = "gated"
    description: ClassVar[str] = "a weight for each key, learned from the key"
    paper: ClassVar[str] = "arXiv 2312.06635 (Gated Linear Attention)"
    weighs: ClassVar[bool] = True

    @property
    def tensors(self) -> dict[str, str]:
        return {"key_weight": "u of each head [H, D]", "key_bias": "c of each head [H]"}

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        return {"key_weight": torch.zeros(heads, head_dim), "key_bias": torch.zeros(heads)}

    def keys(self, q: Tensor, k: Tensor, call: Call, parts: Parts) -> Tensor | None:
        if "key_weight" not in parts:
            return None
        weight = of_heads(parts["key_weight"], call, q, "key_weight", k.shape[3]).float()
        logits = torch.einsum("bhnd,hd->bhn", k.float(), weight)
        if "key_bias" in parts:
            logits = logits + of_heads(parts["key_bias"], call, q, "key_bias").float()[:, None]
        return 2 * logits.sigmoid()
