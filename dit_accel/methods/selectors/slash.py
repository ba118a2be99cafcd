"""Columns and diagonals of blocks: the vertical-slash pattern of MInference (arXiv 2407.02490)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.selectors.base import Scored
from dit_accel.methods.selectors.estimates import scale_of, whole
from dit_accel.methods.selectors.near import first_key, own_blocks
from dit_accel.table import block_count

if TYPE_CHECKING:
    from dit_accel.methods.base import Call

_BYTES = 2**26  # of attention weights at a time


@dataclass(frozen=True)
class Slash(Scored):
    """score_nm = max(c_m, d_{m − n}): c_m is the mean share of the attention on key block m, d_o
    that on the block o from the query's own, both over a sample of the queries.

    The paper samples the last queries, which see most of a text; a video has no last ones. The
    estimate costs 1 / every of dense scores: let the table serve many steps (`reuse`). Where a
    process has a part of the queries, they are a part's columns and diagonals.

    Args:
        every: one query of so many is looked at: 1, 2, 4 … 64.

    Raises ValueError for another number.
    """

    every: int = 8

    name: ClassVar[str] = "slash"
    description: ClassVar[str] = "columns and diagonals of a sample of the attention"
    paper: ClassVar[str] = "arXiv 2407.02490 (MInference), vertical-slash"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"every is 1, 2, 4, 8, 16, 32 or 64 queries, not {self.every}")

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk]."""
        shares = sampled_shares(q, k, call, sizes, self.every)
        rows, blocks = shares.shape[2:]
        low, _ = own_blocks(q.shape[2], *sizes, first_key(q, k, call))
        offset = (torch.arange(blocks) - low + int(low.max())).flatten().to(q.device)
        sums = shares.new_zeros(*shares.shape[:2], int(low.max()) + blocks)
        sums.index_add_(2, offset, shares.flatten(2))
        seen = torch.bincount(offset, minlength=sums.shape[2]).clamp(min=1)
        diagonals = (sums / seen).index_select(2, offset).unflatten(2, (rows, blocks))
        return torch.maximum(shares.mean(2, keepdim=True), diagonals)


def sampled_shares(q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], every: int) -> Tensor:
    """[B, H, Mq, Mk] float32: the share of the attention of every so-manieth query of a block on
    each key block, their mean."""
    n = call.kv_len if isinstance(call.kv_len, int) else k.shape[2]
    blocks, per = block_count(n, sizes[1]), sizes[0] // every
    valid = torch.arange(n, device=k.device) < torch.as_tensor(
        n if call.kv_len is None else call.kv_len, device=k.device
    ).reshape(-1, 1)
    rows = block_count(q.shape[2], sizes[0])
    out = q.new_zeros(*q.shape[:2], rows, blocks, dtype=torch.float32)
    step = max(1, _BYTES // (4 * n * per))
    for b, h in product(*map(range, q.shape[:2])):
        keys, usable = k[b, h, :n].detach().float(), valid[b % len(valid)]
        keys = keys.where(usable[:, None], 0.0)
        sample = q[b, h, ::every].detach().float() * scale_of(q, call)
        for first in range(0, rows, step):
            part = sample[first * per : (first + step) * per]
            weight = (part @ keys.T).masked_fill(~usable, -torch.inf).softmax(-1)
            weight = F.pad(weight, (0, blocks * sizes[1] - n)).unflatten(1, (blocks, -1)).sum(-1)
            found = ops.block_means(weight[None, None], per)[0, 0]
            out[b, h, first : first + len(found)] = found
    return whole(out, k, sizes)
