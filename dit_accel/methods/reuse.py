"""When a block table serves more than one call: some steps, both guidance passes, other layers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
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
        drift: it serves no longer than its queries stay alike: mean cosine of the means of their
            blocks to those that it was chosen for (TAPPA). Looking waits for the device. 0: as long
            as it may.
        leaders: the layers that choose; others read what the last leader before them reads in this
            step and pass (EchoAtt, HyLRA). Empty: all choose.

    Raises ValueError for a number of steps below 1, a drift outside of [0, 1] or without steps, and
    for leaders that are no layers.
    """

    steps: int = 1
    passes: bool = False
    drift: float = 0.0
    leaders: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"a table serves a number of steps ≥ 1, not {self.steps}")
        if not 0 <= self.drift <= 1 or (self.drift and self.steps == 1):
            raise ValueError(
                f"drift is a cosine in [0, 1] that ends the steps of a table, 8+drift0.9, not "
                f"{self}"
            )
        leaders = tuple(sorted(set(self.leaders)))
        if len(leaders) < len(self.leaders) or min(leaders, default=0) < 0:
            raise ValueError(f"leaders are numbers of layers, not {self.leaders}")
        object.__setattr__(self, "leaders", leaders)

    def __str__(self) -> str:
        words = [str(self.steps)] if self.steps > 1 else []
        words += [f"drift{self.drift!r}"] if self.drift else []
        words += ["passes"] * self.passes
        words += ["layers:" + ",".join(map(str, self.leaders))] if self.leaders else []
        return "+".join(words) or "none"

    def __bool__(self) -> bool:
        """Does any table serve again?"""
        return self != Reuse()

    @classmethod
    def read(cls, text: str) -> Reuse:
        """The inverse of str: "none", "4", "passes", "4+passes", "8+drift0.9" or "layers:0,4,8";
        ValueError for another text."""
        form = (
            r"(?P<steps>\d+)|drift(?P<drift>[\d.]+(?:e-\d+)?)|(?P<passes>passes)"
            r"|layers:(?P<leaders>[\d, ]+)"
        )
        found: dict[str, Any] = {}
        for part in [] if text.strip() == "none" else text.split("+"):
            match = re.fullmatch(form, part.strip())
            told = {name: x for name, x in match.groupdict().items() if x} if match else {}
            if not told or told.keys() & found.keys():
                raise ValueError(
                    "reuse is none, a number of steps, passes or 4+passes, with drift0.9 and "
                    f"layers:0,4,8 where they are wanted, not {text!r}"
                )
            found |= told
        try:
            layers = [int(x) for x in found.get("leaders", "").split(",") if x.strip()]
            numbers = (int(found.get("steps", 1)), float(found.get("drift", 0)))
        except ValueError:
            raise ValueError(
                f"reuse has numbers, 8+drift0.9 or layers:0,4,8, not {text!r}"
            ) from None
        return cls(numbers[0], "passes" in found, numbers[1], tuple(layers))

    def find(self, call: Call, q: Tensor, k: Tensor, sizes: tuple[int, int]) -> BlockTable | None:
        """The table that serves this call, if there is one."""
        wanted = _key(call, q, k, sizes)
        leader = self._leader(call)
        if leader is not None:
            step, key, table = call.across.get(leader, (None, None, None))
            return table if step == call.step and key is not None and key == wanted else None
        step, key, table, means = self._store(call).get("reused", (0, None, None, None))
        fresh = 0 <= call.step - step < self.steps and key is not None and key == wanted
        if not fresh or (means is not None and _alike(means, q, sizes) < self.drift):
            return None
        self._publish(table, call, wanted)
        return table

    def keep(
        self, table: BlockTable, call: Call, q: Tensor, k: Tensor, sizes: tuple[int, int]
    ) -> None:
        """Hold a table for the calls that may read it again."""
        key = _key(call, q, k, sizes)
        if self._leader(call) is not None:
            return
        if self.steps > 1 or self.passes:
            means = ops.block_means(q.detach(), sizes[0]) if self.drift else None
            self._store(call)["reused"] = (call.step, key, table, means)
        self._publish(table, call, key)

    def _leader(self, call: Call) -> int | None:
        """The layer whose table a call reads; None where it is its own."""
        before = [layer for layer in self.leaders if layer <= call.layer]
        return before[-1] if before and before[-1] != call.layer else None

    def _publish(self, table: BlockTable, call: Call, key: object) -> None:
        if call.layer in self.leaders:
            call.across[call.layer] = (call.step, key, table)

    def _store(self, call: Call) -> dict[str, Any]:
        return call.together if self.passes else call.state


def _alike(means: Tensor, q: Tensor, sizes: tuple[int, int]) -> float:
    """Mean cosine of the means of q's blocks to `means`."""
    return float(F.cosine_similarity(ops.block_means(q.detach(), sizes[0]), means, dim=-1).mean())


def _key(call: Call, q: Tensor, k: Tensor, sizes: tuple[int, int]) -> tuple[object, ...] | None:
    """What two calls have in common that can share a table; None for one that shares none."""
    if call.grid is None or isinstance(call.kv_len, Tensor):
        return None
    return (q.shape, k.shape[2], sizes, call.keep, call.kv_len, call.grid)
