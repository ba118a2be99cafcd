"""Learned latents that read a block each, and are read by all queries: FIT (arXiv 2305.12689); the
exact part is the table's."""

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
class Latents(Branch):
    """O_lin,i = Σ ṽ_ma softmax_ma(scale · q_i·k̃_ma + ln |m|/r) over blocks m and their latents a,
    k̃_ma, ṽ_ma = Σ_{j∈m} α_aj (k_j, v_j), α_a = softmax_{j∈m}(u_a·k_j), u of each head.

    u = 0 are the means of blocks, where one latent starts; several start at random. With
    linear="rest" the blocks that are read exactly are left out. φ is not used.

    Args:
        count: r, latents of a block.

    Raises ValueError for fewer than one.
    """

    count: int = 1

    name: ClassVar[str] = "latents"
    description: ClassVar[str] = "attention to summaries of blocks that learned queries read"
    paper: ClassVar[str] = "arXiv 2305.12689 (FIT)"
    replaces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ValueError(f"a block has a number of latents ≥ 1, not {self.count}")

    @property
    def tensors(self) -> dict[str, str]:
        return {"latents": f"u of each head [H, {self.count}, D]"}

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(heads, self.count, head_dim, generator=draw) / head_dim**0.5
        return {"latents": start if self.count > 1 else torch.zeros_like(start)}

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
        (mask, sizes), d = held, q.shape[3]
        scale = d**-0.5 if call.scale is None else call.scale
        queries = q.new_zeros(q.shape[1], self.count, d)
        if "latents" in parts:
            queries = of_heads(parts["latents"], call, q, "latents", self.count, d)
        valid = ops.key_mask(k, call.kv_len)
        there = _blocks(valid.expand(k.shape[0], 1, -1, 1), sizes[1])  # [B, 1, M, b, 1]
        keys, values = (_blocks(x.float(), sizes[1]) for x in (k, v))
        looks = keys @ queries.float()[:, None].mT  # [B, H, M, b, r]
        number = there.sum(3).float()  # [B, 1, M, 1]
        some = number[..., None] > 0
        looks = looks.masked_fill(~there & some, -torch.inf).softmax(3).where(some, 0).mT
        keys, values = ((looks @ x).flatten(2, 3) for x in (keys, values))
        weight = (number / self.count).log().expand(-1, -1, -1, self.count).flatten(2)
        rows = [
            _attend(
                q[b, h].float() * scale, keys[b, h], values[b, h], weight[b, 0], pairs, sizes[0]
            )
            for b in range(q.shape[0])
            for h in range(q.shape[1])
            for pairs in [None if mask is None else mask.expand(*q.shape[:2], -1, -1)[b, h]]
        ]
        return torch.stack(rows).view(*q.shape)


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, M, block, …] of x [B, H, N, …], padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, pairs: Tensor | None, block: int
) -> Tensor:
    """[N, D] of one head: softmax of q kᵀ + weight over the latents, those of the pairs [Mq, Mk]
    that are held alone; zeros where none is."""
    scores = q @ k.mT + weight
    if pairs is not None:
        held = pairs.bool().repeat_interleave(len(k) // pairs.shape[1], 1)
        held = held.repeat_interleave(block, 0)[: len(q)]
        scores = scores.masked_fill(~held, -torch.inf)
    some = scores.amax(-1, keepdim=True) > -torch.inf
    return scores.masked_fill(~some, 0).softmax(-1).where(some, 0) @ v
