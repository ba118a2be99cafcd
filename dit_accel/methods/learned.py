"""Methods with learned tensors: their names, their file, and the form they were trained in."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dit_accel.inputs.tensors import open_tensors
from dit_accel.methods.base import Call, Method
from dit_accel.methods.texts import Named

SECOND = "transformer_2."  # before the names of the second of a pipeline's two transformers
Place = tuple[int, int]  # transformer, layer


@dataclass(frozen=True)
class Learned(Method):
    """A method that reads tensors of its own in each layer.

    They are called "layers.<i>.<part>"; those of a second transformer that has its own,
    "transformer_2.layers.<i>.<part>". A layer without any runs without what they are for.

    Args:
        weights: a .safetensors file of `save`, trained in the same form; None is untrained.

    Raises ValueError for weights of another form.
    """

    weights: str | None = None

    form: ClassVar[tuple[str, ...]] = ()  # the options that training fixes
    form_before: ClassVar[dict[str, object]] = {}  # of those that files once did not say

    def __post_init__(self) -> None:
        super().__post_init__()
        loaded = {} if self.weights is None else vars(self._load(self.weights))
        object.__setattr__(self, "_tensors", loaded.get("_tensors", {}))
        object.__setattr__(self, "_second", loaded.get("_second", False))

    @property
    def _learned(self) -> dict[Place, dict[str, Tensor]]:
        """Place → part → tensor; no field, for it is no part of a configuration."""
        return self.__dict__["_tensors"]

    @property
    def _apart(self) -> bool:
        """Has a second transformer tensors of its own, be they idle?"""
        return self.__dict__["_second"]

    @property
    def runs_at_one(self) -> bool:
        """What was learned adds to dense attention, too."""
        return super().runs_at_one or bool(self._learned)

    @property
    def parts(self) -> dict[str, str]:
        """Names of a layer's tensors → what they are."""
        raise TypeError(f"{type(self).__name__} names no learned tensors")

    def check_layer(self, layer: int, parts: Mapping[str, Tensor]) -> None:
        """ValueError where a layer's tensors do not fit together."""

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        """A layer's tensors before training, under which it runs as one without (or nearly).

        width: channels of the attention's input; 0 where the method does not read it.
        """
        raise TypeError(f"{type(self).__name__} does not say how training starts")

    def idle(self, parts: Mapping[str, Tensor]) -> bool:
        """Whether a layer with these tensors is as one without."""
        return False

    def fresh_of(self, layer: int, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        """`fresh` of a layer by its number, where layers are not alike."""
        return self.fresh(heads, head_dim, width)

    def idle_of(self, layer: int, parts: Mapping[str, Tensor]) -> bool:
        """`idle` of a layer by its number, where layers are not alike."""
        return self.idle(parts)

    def with_weights(self, tensors: Mapping[str, Tensor]) -> Self:
        """A copy that uses these tensors, by name. Parameters stay parameters: gradients reach
        them."""
        learned: dict[Place, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            place, part = self._place(name)
            learned.setdefault(place, {})[part] = tensor
        for place, parts in list(learned.items()):
            self.check_layer(place[1], parts)
            if self.idle_of(place[1], parts):
                del learned[place]
        new = copy.copy(self)
        object.__setattr__(new, "_tensors", learned)
        # layers that train idle are left out, yet the second transformer has its own
        object.__setattr__(new, "_second", any(name.startswith(SECOND) for name in tensors))
        return new

    def replaced(self, **changes: Any) -> Self:
        """As Method's; what was learned stays, unless other weights are named."""
        new = super().replaced(**changes)
        if "weights" in changes:
            return new
        new = new.with_weights(self.tensors())
        object.__setattr__(new, "_second", self._apart)
        return new

    def tensors(self) -> dict[str, Tensor]:
        """The learned tensors by the names that `with_weights` takes."""
        return {
            f"{SECOND if second else ''}layers.{layer}.{part}": x
            for (second, layer), parts in self._learned.items()
            for part, x in parts.items()
        }

    def save(self, path: str | Path) -> None:
        """Write the learned tensors and the form they belong to as one safetensors file."""
        from safetensors.torch import save_file

        tensors = {name: x.detach().cpu().contiguous() for name, x in self.tensors().items()}
        save_file(tensors, path, {f"dit_accel.{self.name}": json.dumps(self._form())})

    def check(self, head_dim: int | None, layers: int) -> None:
        """The weights must be of layers that this model has, and of its head_dim."""
        for (_, layer), parts in self._learned.items():
            if layer >= layers:
                raise ValueError(
                    f"{type(self).__name__}'s weights name layer {layer}, but this model has "
                    f"{layers} attention layers; load the weights that were trained for it"
                )
            self.check_head_dim(layer, parts, head_dim)

    def check_head_dim(self, layer: int, parts: Mapping[str, Tensor], head_dim: int | None) -> None:
        """ValueError where a layer's tensors are of another head dimension (None: unknown)."""

    def of(self, call: Call, device: torch.device) -> dict[str, Tensor] | None:
        """The tensors of this call's layer on a device, or None."""
        return self.at((call.part, call.layer), device)

    def at(self, place: Place, device: torch.device) -> dict[str, Tensor] | None:
        """The tensors of a place on a device, or None."""
        place = place if place in self._learned or self._apart else (0, place[1])
        parts = self._learned.get(place)
        if parts is not None and any(x.device != device for x in parts.values()):
            parts = self._learned[place] = {name: x.to(device) for name, x in parts.items()}
        return parts

    def _form(self) -> dict[str, object]:
        values = {name: getattr(self, name) for name in self.form}
        return {name: str(x) if isinstance(x, Named) else x for name, x in values.items()}

    def _place(self, name: str) -> tuple[Place, str]:
        head, _, part = name.removeprefix(SECOND).rpartition(".")
        prefix, _, number = head.rpartition(".")
        if prefix != "layers" or not number.isdigit() or part not in self.parts:
            names = " or ".join(f"layers.<number>.{x}" for x in self.parts)
            form = ", ".join(f"{key}={value!r}" for key, value in self._form().items())
            raise ValueError(f"{type(self).__name__} with {form} takes {names}, not {name!r}")
        return (int(name.startswith(SECOND)), int(number)), part

    def _load(self, path: str) -> Self:
        kind = type(self).__name__
        with open_tensors(path) as file:
            text = (file.metadata() or {}).get(f"dit_accel.{self.name}", "null")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        form = json.loads(text)
        if not isinstance(form, dict):
            raise ValueError(f"{self.weights} was not written by {kind}.save: it lacks its form")
        form = self.form_before | form
        mine = json.loads(json.dumps(self._form()))
        wrong = [name for name in self.form if form.get(name) != mine[name]]
        if wrong:
            asked = ", ".join(f"{name}={form.get(name)!r}" for name in wrong)
            raise ValueError(f"{self.weights} was trained with {asked}: give {kind} the same")
        return self.with_weights(tensors)
