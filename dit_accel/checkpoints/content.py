"""What a checkpoint holds, in the words of this package: weights, changes to weights, learned
tensors of a method, and how it was trained to be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.methods.base import Method


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that has not been read yet: its shape, and how to read it."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """An entry that has been read."""
        return cls(tuple(tensor.shape), lambda: tensor)


@dataclass
class Checkpoint:
    """One transformer's part of a checkpoint.

    Args:
        family: what it was recognised as.
        weights: diffusers name → the weight itself.
        changes: diffusers name → what is added to the weight.
        learned: names of `Learned.with_weights` → tensors of the method.
        method: the method it was trained for, without its tensors; None: dense attention.
        sampler: the grid it was distilled for, in the words of `samplers.Sampler`; None: the
            pipeline's own.
        shifts: of MiniMax H3's two grids, for the clip and for its sound.
        arguments: what the pipeline is to be called with.
        boundary: share of the noise levels at which the second of two transformers takes over.
        whole: `weights` are meant to be all of the transformer's.
        slot: "transformer" or "transformer_2"; None where the file does not tell.
        origin: diffusers name → names in the file that it was made of, where they differ.
        used: names in the file that have been used; unused: those that have not.
        notes: sentences for the user.
    """

    family: str
    weights: dict[str, Entry] = field(default_factory=dict)
    changes: dict[str, Entry] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)
    method: Method | None = None
    sampler: str | None = None
    shifts: tuple[float, float] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    boundary: float | None = None
    whole: bool = False
    slot: str | None = None
    origin: dict[str, list[str]] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
