"""Where query blocks stand among the key blocks, and their neighbours, which Rectified SpaAttn
always reads (arXiv 2511.19835)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dit_accel.machine import cached_tensors
from dit_accel.table import block_count

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


class Near(NamedTuple):
    """bool [Mq, Mk] of blocks that a query block reads in any case, and the most of them in a row
    (or a bound of it)."""

    mask: Tensor
    width: int


def first_key(q: Tensor, k: Tensor, call: Call) -> int:
    """Where among the keys the first of the queries given stands."""
    text = k.shape[2] - (call.queries or q.shape[2]) if call.text_first else 0
    return text + call.first


def around(q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], reach: int) -> Near:
    """`neighbours` of this call."""
    first = first_key(q, k, call)
    return neighbours(q.shape[2], k.shape[2], *sizes, reach, first, q.device)


def own_blocks(n_q: int, block_q: int, block_k: int, first: int) -> tuple[Tensor, Tensor]:
    """int64 [Mq, 1] on the CPU: the first and the last key block that hold a query block's tokens.

    first: where among the keys the first query stands.
    """
    start = torch.arange(0, n_q, block_q, device="cpu")[:, None] + first
    last = (start + block_q).clamp(max=first + n_q) - 1
    return start // block_k, last // block_k


@cached_tensors(8)
def neighbours(
    n_q: int, n_k: int, block_q: int, block_k: int, reach: int, first: int, device: torch.device
) -> Near:
    """The key blocks that hold a query block's own tokens, and `reach` more on either side; first:
    see own_blocks."""
    low, high = own_blocks(n_q, block_q, block_k, first)
    block = torch.arange(block_count(n_k, block_k), device="cpu")
    mask = (block >= low - reach) & (block <= high + reach)
    return Near(mask.to(device), int(mask.sum(-1).max()))
