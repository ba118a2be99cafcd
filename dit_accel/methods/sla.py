"""Sparse-Linear Attention (arXiv 2509.24006; gate: SLA2, arXiv 2602.12675)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel import ops
from dit_accel.inputs import fields
from dit_accel.methods import branches
from dit_accel.methods.base import Call, check_rounding
from dit_accel.methods.branches import forms
from dit_accel.methods.branches.base import Branch
from dit_accel.methods.learned import Learned
from dit_accel.methods.linear import completed
from dit_accel.methods.selectors.base import Chosen
from dit_accel.methods.trained import Parts
from dit_accel.table import BlockTable

_SHAPES = {
    "project": {"weight": "the projection [D, D]", "bias": "[D]"},
    "gate": {"gate": "the logit of α [1]"},
}
_DIMS = {"weight": 2, "bias": 1, "gate": 1}
# α = sigmoid(4) = 0.98: training starts next to plain top-k, where gradients still flow
GATE = 4.0


@dataclass(frozen=True)
class SLA(Learned):
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
        rounding: of the number of blocks kept, "up", or "down" as the public SLA kernels do.
        branch: what the linear branch weighs and what stands beside: a `Branch`, or its text such
            as "decay & rms".
        linear_layers: layers that are linear attention alone, O = O_lin Wᵀ + b over all keys, and
            read no blocks; W = 1 without learned weights (MiniCPM-SALA).
        weights: a .safetensors file of `save`, trained in the same form; None is untrained.

    Raises ValueError for a value outside its range, and for weights of another form.
    """

    linear: str | None = "all"
    combine: str = "project"
    feature_map: str = "softmax"
    skip: float = 0.1
    rounding: str = "up"
    branch: Branch | str = field(default=Branch(), kw_only=True)
    linear_layers: tuple[int, ...] = field(default=(), kw_only=True)

    name: ClassVar[str] = "sla"
    description: ClassVar[str] = "exact on the best key blocks, learned linear attention for others"
    paper: ClassVar[str] = "arXiv 2509.24006"
    finetuning: ClassVar[bool] = True
    form: ClassVar[tuple[str, ...]] = (
        *("linear", "combine", "feature_map", "skip"),
        *("branch", "linear_layers"),
    )
    form_before: ClassVar[dict[str, object]] = {"branch": "plain", "linear_layers": []}
    texts: ClassVar[tuple[str, ...]] = (*Learned.texts, "branch")
    later: ClassVar[tuple[str, ...]] = (*Learned.later, "branch", "linear_layers")
    by_rows: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "safe": {"keep": 0.7},
        "balanced": {"keep": 0.6},
        "fast": {"keep": 0.3},
    }

    def __post_init__(self) -> None:
        fields.check(self)
        _check_choices(self)
        check_rounding(self.rounding)
        if isinstance(self.branch, str):
            object.__setattr__(self, "branch", branches.find(self.branch))
        layers = tuple(sorted(set(self.linear_layers)))
        if len(layers) < len(self.linear_layers) or min(layers, default=0) < 0:
            raise ValueError(f"linear_layers are numbers of layers, not {self.linear_layers}")
        object.__setattr__(self, "linear_layers", layers)
        super().__post_init__()
        branches.check(self.beside, self.linear, self.sorting)

    @property
    def runs_at_one(self) -> bool:
        return super().runs_at_one or bool(self.linear_layers)

    @property
    def beside(self) -> Branch:
        """The branch, as an object."""
        return branches.find(self.branch) if isinstance(self.branch, str) else self.branch

    @property
    def parts(self) -> dict[str, str]:
        own = {} if self.linear is None else _SHAPES[self.combine]
        own = own | _SHAPES["project"] if self.linear_layers else own
        return own | self.beside.tensors | self.selector.tensors

    def check_layer(self, layer: int, parts: Mapping[str, Tensor]) -> None:
        for part, x in parts.items():
            square = part != "weight" or x.shape[0] == x.shape[-1]
            dims = _DIMS.get(part, x.dim())
            if x.dim() != dims or not square or (part == "gate" and x.numel() != 1):
                raise ValueError(
                    f"SLA's layers.{layer}.{part} has shape {list(x.shape)}, and is "
                    f"{self.parts[part]}"
                )
        if "bias" in parts and "weight" not in parts and not self.idle(parts):
            raise ValueError(f"SLA weights name a bias of layer {layer} without a weight")

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        more = self.beside.fresh(heads, head_dim, width)
        more |= self.selector.fresh(heads, head_dim, width)
        if self.linear is None:
            return more
        if self.combine == "gate":
            return {"gate": torch.tensor([GATE])} | more
        own = {"weight": torch.zeros(head_dim, head_dim), "bias": torch.zeros(head_dim)}
        return own | more

    def fresh_of(self, layer: int, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        if layer not in self.linear_layers:
            return self.fresh(heads, head_dim, width)
        own = {"weight": torch.eye(head_dim), "bias": torch.zeros(head_dim)}
        return own | self.beside.fresh(heads, head_dim, width)

    def idle_of(self, layer: int, parts: Mapping[str, Tensor]) -> bool:
        return layer not in self.linear_layers and self.idle(parts)

    def idle(self, parts: Mapping[str, Tensor]) -> bool:
        own = any(_matters(x) for name, x in parts.items() if name in _DIMS)
        mine = own or self.combine == "gate"
        return not mine and self.beside.idle(parts) and self.selector.idle(parts)

    def check(self, head_dim: int | None, layers: int) -> None:
        if max(self.linear_layers, default=0) >= layers:
            raise ValueError(
                f"linear_layers name layer {max(self.linear_layers)}, but this model has {layers} "
                "attention layers"
            )
        super().check(head_dim, layers)

    def check_head_dim(self, layer: int, parts: Mapping[str, Tensor], head_dim: int | None) -> None:
        size = parts["weight"].shape[0] if "weight" in parts else head_dim
        if head_dim is not None and size != head_dim:
            raise ValueError(
                f"SLA's weights of layer {layer} are for head_dim {size}, but this model has "
                f"{head_dim}; load the weights that were trained for it"
            )

    @property
    def rounds_down(self) -> bool:
        return self.rounding == "down"

    @property
    def reads_input(self) -> bool:
        return self.beside.has("gated")

    @property
    def serves_rows(self) -> bool:
        apart = self.beside.has("all_queries") or self.beside.has("gated")
        return super().serves_rows and not apart

    @property
    def places(self) -> tuple[str, ...]:
        return (f"branch={self.branch}",) if self.beside.has("placed") else ()

    def gate(self, hidden: Tensor, place: tuple[int, int], heads: int) -> Tensor | None:
        parts = self.at(place, hidden.device) if self.reads_input else None
        return None if parts is None else self.beside.gate(hidden, heads, parts)

    def chosen(
        self, q: Tensor, k: Tensor, call: Call, v: Tensor | None = None, **rules: object
    ) -> Chosen:
        if self.selector.tensors:
            call = replace(call, learned=self.of(call, q.device))
        return super().chosen(q, k, call, v, **rules)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        learned = self.of(call, q.device)
        if call.layer in self.linear_layers:
            out = forms.alone(self, q, k, v, call, learned)
            return self._complemented(out, q, v, call, learned)
        table = self.table(q, k, call, v)
        if learned is None or not {"weight", "gate"} & learned.keys():
            out = ops.block_sparse_attention(q, k, v, table, call.scale, kv_len=call.kv_len)
        else:
            self.check_head_dim(call.layer, learned, q.shape[3])
            run = forms.weighed if self.beside.alters else forms.plain
            out = run(self, q, k, v, table, call, learned)
        return self._complemented(out, q, v, call, learned)

    def _complemented(
        self, out: Tensor, q: Tensor, v: Tensor, call: Call, learned: Parts | None
    ) -> Tensor:
        addend = None if learned is None else self.beside.addend(q, v, call, learned)
        return out if addend is None else (out + addend).to(q.dtype)

    @property
    def by_parts(self) -> bool:
        pure = self.beside == Branch() and not self.linear_layers
        return self.by_means and self.linear in ("all", None) and pure

    def part(
        self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call
    ) -> tuple[Tensor, Tensor]:
        return ops.block_sparse_attention(q, k, v, table, call.scale, return_lse=True)

    def complete(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """With the linear branch, by the sum of all processes' states."""
        learned = self.of(call, q.device) if self.linear else None
        if learned is None or call.ring is None:
            return out
        self.check_head_dim(call.layer, learned, q.shape[3])
        return completed(out, q, k, v, learned, self.feature_map, call.ring)


def _matters(x: Tensor) -> bool:
    return x.requires_grad or bool(x.any())


def _check_choices(method: SLA) -> None:
    """ValueError for a value that is none of the known ones."""
    for name, values in (
        ("linear", ("all", "rest", "marginal", None)),
        ("combine", ("project", "gate")),
        ("feature_map", ("softmax", "elu", "relu")),
    ):
        if getattr(method, name) not in values:
            choice = ", ".join(map(repr, values))
            raise ValueError(f"{name} is one of {choice}, not {getattr(method, name)!r}")
    if not 0 < method.skip < 1:
        raise ValueError(f"skip is a share of the key blocks in (0, 1), not {method.skip}")
