"""What selectors share: scores of blocks by their means, estimated shares, which blocks count."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
from dit_accel.table import block_count, kept_blocks

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


def scale_of(q: Tensor, call: Call) -> float:
    """The softmax scale."""
    return q.shape[-1] ** -0.5 if call.scale is None else call.scale


def mean_scores(q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
    """scale · q̄_n·k̄_m, [B, H, Mq, Mk] float32; blocks without a valid key have any value."""
    q_mean = ops.block_means(q.detach(), sizes[0])
    k_mean = ops.block_means(k.detach(), sizes[1], call.kv_len)
    return whole(q_mean @ k_mean.mT * scale_of(q, call), k, sizes)


def shares(q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], parts: int) -> Tensor:
    """[B, H, Mq, Mk] float32: the shares of the attention that the means of `parts` of a block
    tell, see ops.block_table; 0 for blocks without a valid key."""
    found = ops.part_scores(q.detach(), k.detach(), *sizes, call.kv_len, scale_of(q, call), parts)
    return whole(found, k, sizes)


def whole(x: Tensor, k: Tensor, sizes: tuple[int, int]) -> Tensor:
    """x [..., m] of the blocks that an int kv_len leaves, filled up with zeros to all of k's."""
    return F.pad(x, (0, block_count(k.shape[2], sizes[1]) - x.shape[-1]))


def live(k: Tensor, call: Call, block: int) -> Tensor:
    """bool [1 or B, 1, 1, M]: blocks of so many keys with a valid one."""
    n = k.shape[2]
    length = torch.as_tensor(n if call.kv_len is None else call.kv_len, device=k.device)
    starts = torch.arange(0, n, block, device=k.device)
    return starts < length.reshape(-1, 1, 1, 1)


def counts(k: Tensor, call: Call, block: int) -> tuple[int, ...]:
    """The blocks that each head keeps, or all of them; of a kv_len tensor the most."""
    n = call.kv_len if isinstance(call.kv_len, int) else k.shape[2]
    keeps = call.keep if isinstance(call.keep, tuple) else (call.keep,)
    return tuple(kept_blocks(keep, block_count(n, block)) for keep in keeps)


def before(scores: Tensor, chosen: Tensor) -> Tensor:
    """Scores of which the chosen ones come before all others, each in their order."""
    return scores + chosen * (scores.amax() - scores.amin() + 1)
