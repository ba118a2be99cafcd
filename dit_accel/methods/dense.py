"""Dense attention: the pipeline as it was, through the same seam; every comparison's control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from dit_accel.methods.base import Call, Method


@dataclass(frozen=True)
class Dense(Method):
    """Every call runs the user's own attention backend; `keep` is 1 and takes no other value."""

    keep: float = 1.0

    chooses: ClassVar[bool] = False
    by_rows: ClassVar[bool] = True
    name: ClassVar[str] = "dense"
    description: ClassVar[str] = "the pipeline's own dense attention, unchanged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep != 1:
            raise ValueError(f"Dense keeps everything: keep is 1, not {self.keep}; use TopK")

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        mask = None
        if call.kv_len is not None:
            valid = torch.as_tensor(call.kv_len, device=k.device).reshape(-1, 1)
            mask = (torch.arange(k.shape[2], device=k.device) < valid)[:, None, None]
        if call.dense is not None:
            return call.dense(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
