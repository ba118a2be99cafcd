"""Where one transformer forward stands; kept by its graph, so that its backward knows it, too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_accel.forward.keys import Reader
from dit_accel.pipelines.base import Geometry


@dataclass(eq=False)
class Place:
    """One forward.

    geometry: its tokens. step, steps, passname: of the generation. keys: what its masks say.
    index: int64 [T·H·W], the order of its visual tokens, or None for raster. order: (index, what
    undoes it) where each call must put them in that order by itself, else None. calls: how many
    each layer has made.
    """

    geometry: Geometry
    step: int
    steps: int | None
    passname: str
    keys: Reader
    index: Tensor | None = None
    order: tuple[Tensor, Tensor] | None = None
    calls: dict[int, int] = field(default_factory=dict)

    def number(self, layer: int) -> int:
        """The how manieth call of a layer starts: some models call once per sample of the batch."""
        number = self.calls.get(layer, 0)
        self.calls[layer] = number + 1
        return number


def in_backward() -> bool:
    """Does autograd run? What runs then is run again: gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


def differentiable(output: object) -> Iterator[Tensor]:
    """The tensors of a forward's output through which gradients will come."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict):
        yield from differentiable(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from differentiable(part)
