"""Blocks by scores that were learned: a low-rank estimate of the attention of blocks, distilled
from their exact shares.

SEA (arXiv 2310.01777) learns to estimate the attention map and keeps its best entries, Sparsifiner
(arXiv 2303.13755) a low-rank map of which tokens matter, Dynamic Mask Attention (arXiv 2508.02124)
what a key's value says of it, Superlinear Attention a router to spans of the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.inputs.tensors import open_tensors
from dit_accel.methods.selectors.base import Chosen, Scored
from dit_accel.methods.selectors.estimates import live, scale_of, shares, whole
from dit_accel.methods.selectors.means import Means
from dit_accel.methods.selectors.regions import inside
from dit_accel.methods.trained import Parts, learn, learns, of_heads

if TYPE_CHECKING:
    from dit_accel.methods.base import Call

EXACT = 64  # parts of a block whose means give the shares that are learned from: single keys


@dataclass(frozen=True)
class Router(Scored):
    """score_nm = q̄_n·k̄_m + (q̄_n A)·(k̄_m B) + c·v̄_m, A, B and c of each head; untrained it is
    `means`, table for table.

    Training adds KL(exact shares of the blocks ‖ softmax_m(scale · score_nm)) to the loss of the
    model, of q, k and v as they are: the choice itself has no gradient.

    Args:
        file: the weights of an SLA that was trained with this selector, for use in any method;
            "": the tensors of the SLA that it is in.
        rank: r of A and B [D, r], where training starts.
        span: blocks of a span. Above 1 the best spans are found first, by the same scores of their
            means, as many as hold twice the blocks that are read, and the blocks inside of them.

    Raises ValueError for a rank or a span below 1, and for a file without such tensors.
    """

    file: str = ""
    rank: int = 32
    span: int = 1

    name: ClassVar[str] = "learned"
    description: ClassVar[str] = "scores learned from exact attention; untrained it is means"
    paper: ClassVar[str] = "arXiv 2310.01777 (SEA), 2303.13755 (Sparsifiner)"
    opens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.rank, self.span) < 1:
            raise ValueError(f"rank and span are ≥ 1, not {self.rank} and {self.span}")
        if self.file and not self.stored:
            raise ValueError(
                f"{self.file} holds no learned selector: train one with "
                "dit-accel finetune --select learned"
            )

    @cached_property
    def stored(self) -> dict[str, dict[str, Tensor]]:
        """ "layers.3" → name → tensor, of the file."""
        found: dict[str, dict[str, Tensor]] = {}
        with open_tensors(self.file) as file:
            for name in file.keys():  # noqa: SIM118
                place, _, part = name.rpartition(".")
                if part in _PARTS:
                    found.setdefault(place, {})[part] = file.get_tensor(name)
        return found

    @property
    def tensors(self) -> dict[str, str]:
        return {} if self.file else _PARTS

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)
        right = torch.randn(heads, head_dim, self.rank, generator=draw) / head_dim**0.5
        zero = {"route_q": torch.zeros_like(right), "route_v": torch.zeros(heads, head_dim)}
        return {} if self.file else {"route_k": right} | zero

    def idle(self, parts: Parts) -> bool:
        return not learns(parts, "route_q", "route_v")

    @property
    def reads_values(self) -> bool:
        return True

    @property
    def files(self) -> tuple[Path, ...]:
        return (Path(self.file),) if self.file else ()

    def of(self, call: Call) -> Parts | None:
        """The tensors of a call's layer, or None where it has none."""
        found = call.learned
        if self.file:
            names = ("transformer_2." * call.part + f"layers.{call.layer}", f"layers.{call.layer}")
            found = next((self.stored[name] for name in names if name in self.stored), None)
        return found if found is not None and _PARTS.keys() <= found.keys() else None

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any
    ) -> Chosen:
        """By `scores`; of a layer without tensors by the means."""
        if self.of(call) is None and self.span == 1:
            return Means().choose(q, k, call, sizes, **rules)
        return super().choose(q, k, call, sizes, **rules)

    def scores(self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int]) -> Tensor:
        """[B, H, Mq, Mk]; while something learns they are given to it."""
        parts, spans = self.of(call), (sizes[0], sizes[1] * self.span)
        fine = _scores(q, k, call, sizes, parts)
        coarse = fine if self.span == 1 else _scores(q, k, call, spans, parts)
        if parts is not None:
            learn(lambda: _loss(fine, coarse, q, k, call, sizes, self.span))
        return fine if self.span == 1 else inside(fine, coarse, k, call, sizes, self.span, 2.0)


_PARTS = {
    "route_q": "A of each head [H, D, r]",
    "route_k": "B of each head [H, D, r]",
    "route_v": "c of each head [H, D]",
}


def _scores(
    q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], parts: Parts | None
) -> Tensor:
    q_mean = ops.block_means(q.detach(), sizes[0])
    k_mean = ops.block_means(k.detach(), sizes[1], call.kv_len)
    found = q_mean @ k_mean.mT
    if parts is not None:
        d, rank = q.shape[3], parts["route_q"].shape[-1]
        left, right = (
            of_heads(parts[name], call, q, name, d, rank).float() for name in ("route_q", "route_k")
        )
        found = found + (q_mean @ left) @ (k_mean @ right).mT
        if call.values is None:
            raise ValueError("learned looks at v, which this call was not given: hand it over")
        v_mean = ops.block_means(call.values.detach(), sizes[1], call.kv_len)
        worth = of_heads(parts["route_v"], call, q, "route_v", d).float()
        found = found + (v_mean @ worth[..., None]).mT
    return whole(found, k, sizes)


def _loss(
    fine: Tensor,
    coarse: Tensor,
    q: Tensor,
    k: Tensor,
    call: Call,
    sizes: tuple[int, int],
    span: int,
) -> Tensor:
    """KL of the exact shares of blocks, and of spans where there are some, to the scores'."""
    exact = shares(q, k, call, sizes, EXACT)
    loss = _divergence(exact, fine, q, k, call, sizes[1])
    if span == 1:
        return loss
    padded = torch.nn.functional.pad(exact, (0, -exact.shape[-1] % span))
    spans = padded.unflatten(-1, (-1, span)).sum(-1)
    return loss + _divergence(spans, coarse, q, k, call, sizes[1] * span)


def _divergence(
    exact: Tensor, scores: Tensor, q: Tensor, k: Tensor, call: Call, block: int
) -> Tensor:
    there = live(k, call, block)
    logs = (scores * scale_of(q, call)).masked_fill(~there, -torch.inf).log_softmax(-1)
    lost = torch.special.xlogy(exact, exact) - exact * logs.masked_fill(~there, 0)
    return lost.sum(-1).mean()
