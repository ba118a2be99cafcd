"""Sparse-Linear Attention (arXiv 2509.24006; gate: SLA2, arXiv 2602.12675)."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.methods.base import Call, Method

_FORM = ("linear", "combine", "feature_map", "skip")


@dataclass(frozen=True)
class SLA(Method):
    """Exact attention to the best key blocks, and learned linear attention for the others.

    combine="project": O = O_sparse + O_lin Wᵀ + b; combine="gate": O = α·O_sparse + (1 − α)·O_lin
    with α = sigmoid(gate). A layer without learned weights, or with W = b = 0, is plain top-k: its
    linear branch is not run.

    Args:
        linear: keys of the linear branch: "all", "rest" (all but the exact ones), "marginal" (of
            these without the lowest share `skip`), None (no branch).
        combine: "project" or "gate".
        feature_map: "softmax", "elu" or "relu".
        skip: share of the key blocks that linear="marginal" leaves out, in (0, 1).
        weights: a .safetensors file of `save`, trained in the same form; None is untrained.

    Raises ValueError for a value outside its range, and for weights of another form.
    """

    linear: str | None = "all"
    combine: str = "project"
    feature_map: str = "softmax"
    skip: float = 0.1
    weights: str | None = None

    name: ClassVar[str] = "sla"
    description: ClassVar[str] = "exact on the best key blocks, learned linear attention for others"
    paper: ClassVar[str] = "arXiv 2509.24006"
    finetuning: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.7},
        "balanced": {"keep": 0.6},
        "fast": {"keep": 0.3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in (
            ("linear", ("all", "rest", "marginal", None)),
            ("combine", ("project", "gate")),
            ("feature_map", ("softmax", "elu", "relu")),
        ):
            if getattr(self, name) not in values:
                choice = ", ".join(map(repr, values))
                raise ValueError(f"{name} is one of {choice}, not {getattr(self, name)!r}")
        if not 0 < self.skip < 1:
            raise ValueError(f"skip is a share of the key blocks in (0, 1), not {self.skip}")
        object.__setattr__(self, "_learned", {} if self.weights is None else self._load())

    def with_weights(self, tensors: Mapping[str, Tensor]) -> SLA:
        """A copy that uses these tensors: "layers.<i>.weight" [D, D] and "layers.<i>.bias" [D], or
        "layers.<i>.gate" [1]. Parameters stay parameters: gradients reach them."""
        learned: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            layer, part = self._part(name, tensor)
            learned.setdefault(layer, {})[part] = tensor
        for layer, parts in list(learned.items()):
            if self.combine == "project" and not any(map(_matters, parts.values())):
                del learned[layer]
            elif self.combine == "project" and "weight" not in parts:
                raise ValueError(f"SLA weights name a bias of layer {layer} without a weight")
        new = copy.copy(self)
        object.__setattr__(new, "_learned", learned)
        return new

    def save(self, path: str | Path) -> None:
        """Write the learned tensors and the form they belong to as one safetensors file."""
        from safetensors.torch import save_file

        tensors = {
            f"layers.{layer}.{part}": x.detach().cpu().contiguous()
            for layer, parts in self._learned.items()
            for part, x in parts.items()
        }
        form = {name: getattr(self, name) for name in _FORM}
        save_file(tensors, path, {"dit_accel.sla": json.dumps(form)})

    def check(self, head_dim: int | None, layers: int) -> None:
        """The weights must be of this model's head_dim and of layers that it has."""
        for layer, parts in self._learned.items():
            if layer >= layers:
                raise ValueError(
                    f"SLA's weights name layer {layer}, but this model has {layers} attention "
                    "layers; load the weights that were trained for it"
                )
            size = parts["weight"].shape[0] if "weight" in parts else head_dim
            if head_dim is not None and size != head_dim:
                raise ValueError(
                    f"SLA's weights of layer {layer} are for head_dim {size}, but this model has "
                    f"{head_dim}; load the weights that were trained for it"
                )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        table = self.select(q, k, call)
        options = {"scale": call.scale, "kv_len": call.kv_len}
        learned = self._of(call.layer, q) if self.linear else None
        if learned is None:
            return ops.block_sparse_attention(q, k, v, table, **options)
        options |= {"feature_map": self.feature_map, "linear": self.linear}
        if self.linear == "marginal":
            options["skip"] = self._lowest(q, k, call)
        if self.combine == "project":
            return ops.sparse_linear_attention(
                q, k, v, table, learned["weight"], learned.get("bias"), **options
            )
        # α·O_s + (1 − α)·O_l = α·(O_s + e^(−gate)·O_l)
        gate = learned["gate"].float()
        eye = torch.eye(q.shape[3], device=q.device)
        out = ops.sparse_linear_attention(q, k, v, table, eye * (-gate).exp(), **options)
        return (out * gate.sigmoid()).to(q.dtype)

    def _lowest(self, q: Tensor, k: Tensor, call: Call):
        """The `skip` worst blocks: the best ones of the opposite query."""
        sizes = (self.query_block(q.shape[2]), self.block_k)
        return ops.block_table(-q, k, self.skip, *sizes, kv_len=call.kv_len)

    def _of(self, layer: int, q: Tensor) -> dict[str, Tensor] | None:
        """This layer's tensors on q's device, or None."""
        parts = self._learned.get(layer)
        if parts is None:
            return None
        size = parts["weight"].shape[0] if "weight" in parts else q.shape[3]
        if size != q.shape[3]:
            raise ValueError(
                f"SLA's weights of layer {layer} are for head_dim {size}, but this model has "
                f"{q.shape[3]}; load the weights that were trained for it"
            )
        if any(x.device != q.device for x in parts.values()):
            self._learned[layer] = {name: x.to(q.device) for name, x in parts.items()}
        return self._learned[layer]

    def _part(self, name: str, tensor: Tensor) -> tuple[int, str]:
        known = {"project": {"weight": 2, "bias": 1}, "gate": {"gate": 1}}[self.combine]
        head, _, part = name.rpartition(".")
        prefix, _, number = head.rpartition(".")
        if prefix != "layers" or not number.isdigit() or part not in known:
            names = " or ".join(f"layers.<number>.{x}" for x in known)
            raise ValueError(f"SLA with combine={self.combine!r} takes {names}, not {name!r}")
        square = part != "weight" or tensor.shape[0] == tensor.shape[-1]
        if tensor.dim() != known[part] or not square or (part == "gate" and tensor.numel() != 1):
            raise ValueError(f"SLA's {name} has shape {list(tensor.shape)}: see SLA.with_weights")
        return int(number), part

    def _load(self) -> dict[int, dict[str, Tensor]]:
        from safetensors import safe_open

        if not Path(self.weights).is_file():
            raise ValueError(f"there is no weights file {self.weights}")
        with safe_open(self.weights, "pt") as file:
            form = json.loads((file.metadata() or {}).get("dit_accel.sla", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not isinstance(form, dict):
            raise ValueError(f"{self.weights} was not written by SLA.save: it lacks its form")
        mine = {name: getattr(self, name) for name in _FORM}
        wrong = [name for name in _FORM if form.get(name) != mine[name]]
        if wrong:
            asked = ", ".join(f"{name}={form.get(name)!r}" for name in wrong)
            raise ValueError(f"{self.weights} was trained with {asked}: give SLA the same")
        return self.with_weights(tensors)._learned


def _matters(x: Tensor) -> bool:
    return x.requires_grad or bool(x.any())
