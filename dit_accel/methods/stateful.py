"""Methods that remember a full step: O = r·O_partial + R, R what O_partial missed then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_accel.methods.base import Call, Method
from dit_accel.ops import block_means
from dit_accel.schedule import count_steps
from dit_accel.table import BlockTable, block_count

_RESIDUALS = ("full", "fp8", "pooled", "none")
_UNKNOWN = 20
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Remembering(Method):
    """A full step runs dense and keeps R; the partial steps after it add R to what they compute.

    Guidance multiplies what its passes differ by: errors that they make alike cancel, and those of
    one alone grow. A step cache lets one pass run where it skips the other; where their last full
    steps are no longer the same, the next step is full, too.

    Args:
        period: a full step comes at the latest this long after the last one: a share of the run
            (float in (0, 1]) or a number of steps (int); or a tuple of such, the places in the run
            where full steps come, of two in a row the first alone. The run's last step is none:
            nothing would use what it finds. A schedule's `refresh` can ask for more.
        residual: how R is kept: "full" (the model's dtype), "fp8" (a scale per row), "pooled" (one
            mean per query block) or "none" (not at all).

    Raises ValueError for a value outside its range. Before the first step of a generation the
    bytes of its state are logged, and a RuntimeError says when they do not fit in free memory.
    """

    period: float | int | tuple[float | int, ...] = 0.25
    residual: str = "full"

    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.period, list):
            object.__setattr__(self, "period", tuple(self.period))
        places = self.period if isinstance(self.period, tuple) else (self.period,)
        if not places or not all(map(_is_place, places)):
            raise ValueError(
                "period is a number of steps ≥ 1, a share of them in (0, 1], or a tuple of such, "
                f"not {self.period}"
            )
        if self.residual not in _RESIDUALS:
            raise ValueError(f"residual is one of {', '.join(_RESIDUALS)}, not {self.residual!r}")

    def due(self, step: int, last: int, steps: int | None) -> bool:
        """Whether a full step is due in a run of so many (unknown: 20), the last one being `last`;
        of a share not before the second step after it, for else none would be sparse. One that
        falls on the run's last step is not, but one that was skipped before it is made up for."""
        count = _UNKNOWN if steps is None else steps
        if isinstance(self.period, tuple):
            counted = (count_steps(place, count) for place in self.period)
            places = [place for place in counted if place > last + 1]
        elif isinstance(self.period, int):
            places = [last + self.period]
        else:
            places = [last + max(2, count_steps(self.period, count))]
        return any(place <= step and place + 1 != steps for place in places)

    def full_steps(self, first: int, steps: int) -> list[int]:
        """The full steps of a run whose first sparse step is `first`."""
        found = [first] if first < steps else []
        for step in range(first + 1, steps):
            if self.due(step, found[-1], steps):
                found.append(step)
        return found

    def state_bytes(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> int:
        """Bytes kept for one layer in one guidance pass.

        shape: of q, (B, H, N, D), without text tokens. dtype: of the attention's tensors.
        """
        batch, heads, n, d = shape
        rows, item = batch * heads * n, torch.finfo(dtype).bits // 8
        kept = {
            "full": rows * d * item,
            "fp8": rows * (d + 4),
            "pooled": batch * heads * block_count(n, self.query_block(n)) * d * item,
            "none": 0,
        }
        return kept[self.residual]

    def full(
        self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call
    ) -> tuple[Tensor, Tensor]:
        """The dense output, and r · O_partial in float32."""
        raise TypeError(f"{type(self).__name__} defines no full step")

    def partial(self, q: Tensor, k: Tensor, v: Tensor, table: BlockTable, call: Call) -> Tensor:
        """r · O_partial, float32 or q's dtype: adding R rounds once either way."""
        raise TypeError(f"{type(self).__name__} defines no partial step")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        state = call.state
        known = state.get("shape") == (q.shape, q.dtype) and not self._apart(call)
        if not known or call.refresh or self.due(call.step, state["step"], call.steps):
            call.note(None)
            for name in ("residual", "scale", "table"):  # the old go before the new come
                state.pop(name, None)
            table = self.table(q, k, call, v)
            state.update(step=call.step, shape=(q.shape, q.dtype))
            call.together.setdefault("full", {})[call.passname] = call.step
            full, part = self.full(q, k, v, table, call)
            self._keep(full.float() - part, q.dtype, state, self.sizes(q, call)[0])
            return full
        table = self.table(q, k, call, v)
        call.note(table)
        out = self.partial(q, k, v, table, call)
        missing = self._missing(state, q.shape[2], self.sizes(q, call)[0])
        return (out if missing is None else out + missing).to(q.dtype)

    def _apart(self, call: Call) -> bool:
        """Had another guidance pass, of those that still run, its last full step elsewhere?"""
        mine, others = call.state.get("step"), call.together.get("full", {}).values()
        return any(step != mine and not self.due(call.step, step, call.steps) for step in others)

    def _keep(self, missing: Tensor, dtype: torch.dtype, state: dict[str, Any], block: int) -> None:
        missing = missing.detach()  # the graph of a step ends with it
        if self.residual == "full":
            state["residual"] = missing.to(dtype)
        if self.residual == "pooled":
            state["residual"] = block_means(missing, block).to(dtype)
        if self.residual == "fp8":
            top = missing.abs().amax(-1, keepdim=True).clamp(min=1e-12)
            state["scale"] = top / torch.finfo(_FP8).max
            state["residual"] = (missing / state["scale"]).to(_FP8)

    def _missing(self, state: dict[str, Any], n: int, block: int) -> Tensor | None:
        missing = state.get("residual")
        if missing is None:
            return None
        if self.residual == "fp8":
            return missing.float() * state["scale"]
        if self.residual == "pooled":
            return missing.repeat_interleave(block, 2)[:, :, :n]
        return missing


def _is_place(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 1 if isinstance(value, int) else 0 < value <= 1
