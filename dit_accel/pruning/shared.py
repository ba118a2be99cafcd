"""Tokens that are shared between devices: each device prunes its own part of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.pipelines.base import Geometry, SpanSite
from dit_accel.pruning.config import TokenPruning

# What looks at all tokens, or at the model's output.
_OF_ONE_DEVICE = {
    "criterion": ("velocity", "cfg", "text"),
    "restore": ("blend",),
    "context": ("pooled", "stale"),
}


class Part(NamedTuple):
    """One device's part of the tokens (rank of ranks): each chooses as many of its own."""

    rank: int = 0
    ranks: int = 1

    def own(self, tokens: Tensor, n: int) -> Tensor:
        """This device's of tokens [B, N, C], where they come as all n of them."""
        whole = tokens.shape[1] == n
        return tokens.tensor_split(self.ranks, dim=1)[self.rank] if whole else tokens

    def always(self, n: int, prune: TokenPruning, device: torch.device) -> Tensor | None:
        """bool [n]: a short last block, which must run on all devices for counts to be the same."""
        tail = n % prune.block if prune.keep and self.ranks > 1 else 0
        return torch.arange(n, device=device) >= n - tail if tail else None

    def obstacle(
        self, prune: TokenPruning, site: SpanSite, geometry: Geometry, plan: Mapping[str, object]
    ) -> str:
        """Why this pruning does not run on tokens shared between devices, or "".

        plan: diffusers' own, by which the transformer's tokens are split.
        """
        if self.ranks == 1:
            return ""
        if site.text or site.single or site.count:
            return "its text is shared between devices, too (context parallelism)"
        if f"{site.blocks[0]}.0" not in plan:
            return "its tokens are not split between devices at the first block"
        if prune.first == 0:
            return "its tokens are shared between devices inside the first block: take first=1"
        if geometry.n_visual % self.ranks:
            return f"{geometry.n_visual} tokens do not divide by {self.ranks} devices"
        for name, values in _OF_ONE_DEVICE.items():
            if (value := getattr(prune, name)) in values:
                return f"{name}={value!r} does not run on tokens shared between devices"
        if prune.threshold is not None or prune.anchor_frames:
            return "threshold and anchor_frames would run more tokens on one device than on another"
        return ""
