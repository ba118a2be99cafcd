"""Blocks by chunks of tokens that are alike, whose borders the content draws (DHSA, arXiv
2510.24606)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.selectors.base import Scored
from dit_accel.methods.selectors.estimates import scale_of, whole
from dit_accel.table import block_count

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Chunks(Scored):
    """score_nm = Σ_{c, c'} |c∩n|·|c'∩m| / (|n|·|m|) · x_c·y_c' with x_c = √|c| · the mean of chunk
    c's queries, y_c' so of keys.

    Chunks are as many as blocks; they end where neighbours in the sequence are least alike (DHSA
    learns where), at least so many tokens apart.

    Args:
        least: tokens of a chunk, ≥ 1.

    Raises ValueError for none.
    """

    least: int = 16

    name: ClassVar[str] = "chunks"
    description: ClassVar[str] = "means of chunks that end where tokens change"
    paper: ClassVar[str] = "arXiv 2510.24606 (DHSA), without its learned borders"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least < 1:
            raise ValueError(f"a chunk has at least one token, not {self.least}")

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk]."""
        n = call.kv_len if isinstance(call.kv_len, int) else k.shape[2]
        length = call.kv_len if isinstance(call.kv_len, Tensor) else None
        means = []
        for x, size, valid in ((q, sizes[0], None), (k[:, :, :n], sizes[1], length)):
            x, known = x.detach().float(), None
            if valid is not None:
                known = torch.arange(n, device=x.device) < valid.to(x.device).reshape(-1, 1, 1)
                x = x.where(known[..., None], 0.0)
            ends = borders(x, block_count(x.shape[2], size), self.least)
            means.append(ops.block_means(chunked(x, ends, known), size, valid))
        return whole(means[0] @ means[1].mT * scale_of(q, call), k, sizes)


def borders(x: Tensor, count: int, least: int) -> Tensor:
    """bool [B, H, N] of x [B, H, N, D]: tokens that begin one of `count` chunks or fewer, the first
    one not marked."""
    n = x.shape[2]
    begin = torch.zeros(x.shape[:3], dtype=torch.bool, device=x.device)
    if count < 2 or n < 2 * least:
        return begin
    alike = F.cosine_similarity(x[:, :, 1:], x[:, :, :-1], dim=-1)
    lowest = -F.max_pool1d(-alike, 2 * least - 1, 1, least - 1)
    alike = alike.masked_fill(alike > lowest, torch.inf)
    alike[..., : least - 1], alike[..., n - least :] = torch.inf, torch.inf
    found = alike.topk(min(count - 1, n - 1), largest=False)
    return begin.scatter(2, found.indices + 1, found.values < torch.inf)


def chunked(x: Tensor, begin: Tensor, known: Tensor | None = None) -> Tensor:
    """x [B, H, N, D] with √|c| · the mean of its chunk c for each token. known: bool [B, 1, N], the
    valid tokens; None: all."""
    number = begin.cumsum(-1)[..., None]
    held = (
        torch.ones_like(x[..., :1])
        if known is None
        else known[..., None].expand(*x.shape[:3], 1).to(x.dtype)
    )
    sums = torch.zeros_like(x).scatter_add(2, number.expand_as(x), x)
    size = torch.zeros_like(held).scatter_add(2, number, held)
    return (sums / size.clamp(min=1).sqrt()).gather(2, number.expand_as(x))
