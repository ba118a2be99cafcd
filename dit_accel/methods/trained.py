"""What selectors and branches have in common: a text that names them, and tensors of each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.forward.place import in_backward
from dit_accel.machine import among
from dit_accel.methods.texts import Named

if TYPE_CHECKING:
    from dit_accel.methods.base import Call

Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trained(Named):
    """A part of a method that may have tensors in each layer, beside the method's own.

    Those with a number for each head hold all heads of the layer; a call may have some of them.
    """

    @property
    def tensors(self) -> dict[str, str]:
        """Names of a layer's tensors → what they are."""
        return {}

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        """A layer's tensors before training; see Learned.fresh."""
        return {}

    def idle(self, parts: Parts) -> bool:
        """Whether a layer with these tensors, and no others that matter, is as one without."""
        return True


def of_heads(x: Tensor, call: Call, q: Tensor, name: str, *rest: int) -> Tensor:
    """What a tensor [H, …] has for the heads of a call; ValueError where it is of another shape."""
    heads, shape = call.heads, tuple(x.shape[1:])
    if shape != rest or (x.shape[0] != q.shape[1] if heads is None else max(heads) >= x.shape[0]):
        wanted = [q.shape[1] if heads is None else max(heads) + 1, *rest]
        raise ValueError(
            f"{name} of layer {call.layer} is {list(x.shape)}, but this model's heads make it "
            f"{wanted}; load the weights that were trained for it"
        )
    return (x if heads is None else x[list(heads)]).to(q.device)


def learns(parts: Parts, *names: str) -> bool:
    """Is one of these tensors trained, or other than zero?"""
    found = (parts[name] for name in names if name in parts)
    return any(x.requires_grad or bool(x.any()) for x in found)


# Of the process, not of a thread: autograd runs checkpointed layers again in threads of its own.
_HEARD: list[list[Tensor]] = []


def lessons() -> AbstractContextManager[list[Tensor]]:
    """Collect the losses of what learns beside the model's own, in a forward inside a block; its
    backward pass belongs inside, too."""
    return among(_HEARD)


def learn(loss: Callable[[], Tensor]) -> None:
    """Give a loss [] to whoever trains. A layer that is run again in the backward pass makes it
    again, for its graph, and gives none."""
    if not _HEARD or not torch.is_grad_enabled():
        return
    found = loss()
    if not in_backward():
        _HEARD[-1].append(found)
