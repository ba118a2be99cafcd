"""A memory that trains while it runs: AllMem's, and that of test-time training (arXiv 2407.04620),
as a linear map from keys to values that descends its own loss in each call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.branches.base import Branch
from dit_accel.methods.trained import Parts, of_heads

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Memory(Branch):
    """O_lin,i = φ(q_i) M after `steps` of gradient descent from M = 0 on ½ Σ_j ‖φ(k_j) M − v_j‖² of
    all keys at once: M ← M + η (H − G M), H = Σ φ(k_j)ᵀ v_j, G = Σ φ(k_j)ᵀ φ(k_j).

    η = 2·sigmoid(r) / tr G, r of each head: no rate diverges. One step is linear attention without
    its divisor: with "rms" it is that branch. More steps take out what keys have in common, up to
    the least squares.

    Args:
        steps: of the descent, D × D products each.

    Raises ValueError for fewer than one.
    """

    steps: int = 4

    name: ClassVar[str] = "memory"
    description: ClassVar[str] = "a linear memory, trained on keys and values in each call"
    paper: ClassVar[str] = "AllMem; arXiv 2407.04620 (test-time training)"
    replaces: ClassVar[bool] = True
    all_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"a memory makes a number of steps ≥ 1, not {self.steps}")

    @property
    def tensors(self) -> dict[str, str]:
        return {"memory_rate": "r of each head [H]"}

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        return {"memory_rate": torch.zeros(heads)}

    def linear(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: Call,
        feature_map: str,
        held: tuple[Tensor | None, tuple[int, int]],
        parts: Parts,
    ) -> Tensor:
        valid = ops.key_mask(k, call.kv_len)
        keys = ops.features(k.float(), feature_map).where(valid, 0)
        state, gram = keys.mT @ v.float().where(valid, 0), keys.mT @ keys
        rate = torch.zeros(q.shape[1], device=q.device)
        if "memory_rate" in parts:
            rate = of_heads(parts["memory_rate"], call, q, "memory_rate")
        size = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-30)
        eta = (2 * rate.float().sigmoid() / size)[..., None, None]
        memory = eta * state
        for _ in range(self.steps - 1):
            memory = memory + eta * (state - gram @ memory)
        return ops.features(q.float(), feature_map) @ memory
