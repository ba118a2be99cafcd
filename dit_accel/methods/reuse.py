"""When a block table serves more than one call: some steps, or both guidance passes of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dit_accel.table import BlockTable

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class Reuse:
    """A table of a layer is chosen once and read again (HyLRA and NOSA, turned to steps).

    It is no state of the method: where tokens are pruned, padding differs from sample to sample or
    the shapes change, each call chooses its own.

    Args:
        steps: that a table serves, from the one that chose it on; 1 is none but that.
        passes: the guidance passes of a step share the table of the first. Guidance takes their
            difference, so errors that both make alike cancel.

    Raises ValueError for a number of steps below 1.
    """

    steps: int = 1
    passes: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"a table serves a number of steps ≥ 1, not {self.steps}")

    def __str__(self) -> str:
        words = [str(self.steps)] if self.steps > 1 else []
        return "+".join(words + ["passes"] * self.passes) or "none"

    def __bool__(self) -> bool:
        """Does any table serve again?"""
        return self != Reuse()

    @classmethod
    def read(cls, text: str) -> Reuse:
        """The inverse of str: "none", "4", "passes" or "4+passes"; ValueError for another text."""
        parts = [] if text.strip() == "none" else [x.strip() for x in text.split("+")]
        steps = [int(x) for x in parts if x.isdecimal()]
        if len(steps) > 1 or set(parts) - {"passes", *map(str, steps)}:
            raise ValueError(f"reuse is none, a number of steps, passes or 4+passes, not {text!r}")
        return cls(steps[0] if steps else 1, "passes" in parts)

    def find(self, call: Call, q: Tensor, k: Tensor, sizes: tuple[int, int]) -> BlockTable | None:
        """The table that serves this call, if there is one."""
        step, key, table = self._store(call).get("reused", (0, None, None))
        fresh = 0 <= call.step - step < self.steps
        return table if fresh and key is not None and key == _key(call, q, k, sizes) else None

    def keep(
        self, table: BlockTable, call: Call, q: Tensor, k: Tensor, sizes: tuple[int, int]
    ) -> None:
        """Hold a table for the calls that may read it again."""
        if self.steps > 1 or self.passes:
            self._store(call)["reused"] = (call.step, _key(call, q, k, sizes), table)

    def _store(self, call: Call) -> dict[str, Any]:
        return call.together if self.passes else call.state


def _key(call: Call, q: Tensor, k: Tensor, sizes: tuple[int, int]) -> tuple[object, ...] | None:
    """What two calls have in common that can share a table; None for one that shares none."""
    if call.grid is None or isinstance(call.kv_len, Tensor):
        return None
    return (q.shape, k.shape[2], sizes, call.keep, call.kv_len, call.grid)
