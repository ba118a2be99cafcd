"""From coarse to fine: stretches of blocks first, then blocks inside of them.

Controls: at any length of a video the scores of all blocks cost next to nothing beside the
attention, so that looking at fewer of them saves no time.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dit_accel.methods.selectors.base import Scored
from dit_accel.methods.selectors.estimates import before, counts, live, mean_scores
from dit_accel.table import block_count

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Regions(Scored):
    """The best blocks inside the best regions: ⌈K·factor / group⌉ regions of `group` blocks whose
    mean has the largest product with the query's, then the K best blocks in them by `means`.

    Raises ValueError for a group or a factor below 1.
    """

    group: int = 8
    factor: float = 2.0

    name: ClassVar[str] = "regions"
    description: ClassVar[str] = "regions of blocks first, then blocks inside of them"
    paper: ClassVar[str] = "arXiv 2303.08810 (BiFormer), regions; Superlinear Attention, spans"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1 or self.factor < 1:
            raise ValueError(f"group and factor are ≥ 1, not {self.group} and {self.factor}")

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk]: those inside before all others."""
        fine = mean_scores(q, k, call, sizes)
        coarse = mean_scores(q, k, call, (sizes[0], sizes[1] * self.group))
        return inside(fine, coarse, k, call, sizes, self.group, self.factor)


@dataclass(frozen=True)
class Tree(Scored):
    """K stretches of the keys are halved again and again; of the 2·K halves those K stay whose
    middle block scores best by `means`, until they are single blocks.

    Heads with a keep of their own take their K from the search of the widest one.
    """

    name: ClassVar[str] = "tree"
    description: ClassVar[str] = "a tree search of the best blocks by means"
    paper: ClassVar[str] = "arXiv 2406.09827 (HiP)"

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk]: those found before all others."""
        scores = mean_scores(q, k, call, sizes)
        n = call.kv_len if isinstance(call.kv_len, int) else k.shape[2]
        blocks, most = block_count(n, sizes[1]), max(counts(k, call, sizes[1]))
        seen = scores.masked_fill(~live(k, call, sizes[1]), -torch.inf)
        at = torch.arange(min(most, blocks) + 1, device=q.device) * blocks // min(most, blocks)
        begin, end = (x.expand(*scores.shape[:3], -1) for x in (at[:-1], at[1:]))
        for _ in range((ceil(blocks / most) - 1).bit_length()):
            middle = (begin + end) // 2
            begin, end = torch.cat([begin, middle], -1), torch.cat([middle, end], -1)
            worth = seen.gather(-1, ((begin + end) // 2).clamp(max=blocks - 1))
            best = worth.masked_fill(begin == end, -torch.inf).topk(at.numel() - 1).indices
            begin, end = begin.gather(-1, best), end.gather(-1, best)
        return before(scores, torch.zeros_like(scores, dtype=torch.bool).scatter(-1, begin, True))


def inside(
    fine: Tensor,
    coarse: Tensor,
    k: Tensor,
    call: Call,
    sizes: tuple[int, int],
    group: int,
    factor: float,
) -> Tensor:
    """Scores of blocks [B, H, Mq, Mk], those before all others that lie in the best regions of
    `group` blocks by `coarse` [B, H, Mq, ⌈Mk / group⌉]: as many as hold `factor` times K blocks."""
    coarse = coarse.masked_fill(~live(k, call, sizes[1] * group), -torch.inf)
    most = coarse.shape[-1]
    wanted = [min(most, ceil(n * factor / group)) for n in counts(k, call, sizes[1])]
    place = coarse.argsort(-1, descending=True).argsort(-1)
    best = place < torch.tensor(wanted, device=fine.device).reshape(-1, 1, 1)
    return before(fine, best.repeat_interleave(group, -1)[..., : fine.shape[-1]])
