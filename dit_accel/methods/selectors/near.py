"""The neighbours of a query block, which Rectified SpaAttn always reads (arXiv 2511.19835)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.machine import cached_tensors
from dit_accel.table import block_count


class Near(NamedTuple):
    """bool [Mq, Mk] of the blocks near a query block, and the most of them in a row."""

    mask: Tensor
    width: int


@cached_tensors(8)
def neighbours(
    n_q: int, n_k: int, block_q: int, block_k: int, reach: int, first: int, device: torch.device
) -> Near:
    """The key blocks that hold a query block's own tokens, and `reach` more on either side.

    first: where among the keys the first query stands.
    """
    start = torch.arange(0, n_q, block_q, device="cpu")[:, None] + first
    last = (start + block_q).clamp(max=first + n_q) - 1
    block = torch.arange(block_count(n_k, block_k), device="cpu")
    mask = (block >= start // block_k - reach) & (block <= last // block_k + reach)
    return Near(mask.to(device), int(mask.sum(-1).max()))
