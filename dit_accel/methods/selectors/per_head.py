"""For each head of each layer the selector that erred least in a profile: MInference's choice of a
pattern for each head (arXiv 2407.02490), made offline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.methods.budget import Profile, at
from dit_accel.methods.selectors.base import Chosen, Selector
from dit_accel.table import BlockTable

if TYPE_CHECKING:
    from dit_accel.methods.base import Call


@dataclass(frozen=True)
class PerHead(Selector):
    """Each head's blocks by the selector that has the least error at its keep in `file`, which
    `dit-accel profile --try` writes.

    Raises ValueError for a file that is no profile, or that lacks the heads of a call.
    """

    file: str

    name: ClassVar[str] = "per-head"
    description: ClassVar[str] = "for each head the best selector of a profile"
    paper: ClassVar[str] = "arXiv 2407.02490 (MInference), a pattern for each head"
    needs: ClassVar[str] = "profile.json"
    opens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        from dit_accel.methods.selectors import find

        profile = Profile.load(self.file)
        known = {name: (find(name), profile.curves(name)) for name in profile.heads}
        object.__setattr__(self, "_known", known)

    @property
    def known(self) -> dict[str, tuple[Selector, dict[tuple[int, int], dict[float, float]]]]:
        """Text → the selector, and its (layer, head) → keep → error."""
        return self.__dict__["_known"]

    @property
    def placed(self) -> bool:
        return any(selector.placed for selector, _ in self.known.values())

    @property
    def reads_values(self) -> bool:
        return any(selector.reads_values for selector, _ in self.known.values())

    @property
    def files(self) -> tuple[Path, ...]:
        return (Path(self.file),)

    def best(self, layer: int, head: int, keep: float) -> str:
        """The text of the selector that errs least."""
        place = (layer, head)
        if any(place not in curves for _, curves in self.known.values()):
            raise ValueError(
                f"{self.file} knows nothing of head {head} in layer {layer}: profile this model"
            )
        return min(self.known, key=lambda name: at(self.known[name][1][place], keep))

    def choose(
        self, q: Tensor, k: Tensor, call: Call, sizes: tuple[int, int], **rules: Any
    ) -> Chosen:
        """The tables of several selectors, by head; block means only where there is one."""
        n = q.shape[1]
        heads = call.heads or tuple(range(n))
        keeps = call.keep if isinstance(call.keep, tuple) else (call.keep,) * n
        groups: dict[str, list[int]] = {}
        for i, (head, keep) in enumerate(zip(heads, keeps, strict=True)):
            groups.setdefault(self.best(call.layer, head, keep), []).append(i)
        if len(groups) == 1:
            return self.known[next(iter(groups))][0].choose(q, k, call, sizes, **rules)
        rules = {x: y for x, y in rules.items() if x not in ("return_means", "spreads")}
        tables = []
        for name, own in groups.items():
            mine = _of_heads(call, own, heads, keeps)
            selector = self.known[name][0]
            tables.append(selector.choose(q[:, own], k[:, own], mine, sizes, **rules)[0])
        return _merged(tables, sum(groups.values(), [])), None


def _of_heads(call: Call, own: list[int], heads: tuple[int, ...], keeps: tuple[float, ...]) -> Call:
    """The call of some of its heads."""
    forced, values = call.forced, call.values
    if forced is not None and forced.dim() == 4 and forced.shape[1] > 1:
        forced = forced[:, own]
    return replace(
        call,
        heads=tuple(heads[i] for i in own),
        keep=tuple(keeps[i] for i in own) if isinstance(call.keep, tuple) else call.keep,
        forced=forced,
        values=None if values is None else values[:, own],
    )


def _merged(tables: list[BlockTable], places: list[int]) -> BlockTable:
    """Tables of some heads each as one; places: those of their heads, one table after another."""
    width = max(table.indices.shape[-1] for table in tables)
    rows = [F.pad(x.indices, (0, width - x.indices.shape[-1])) for x in tables]
    back = torch.tensor(places).argsort().tolist()
    indices = torch.cat(rows, 1)[:, back].contiguous()
    counts = torch.cat([table.counts for table in tables], 1)[:, back].contiguous()
    uneven = any(x.uneven or x.indices.shape[-1] < width for x in tables)
    return replace(tables[0], indices=indices, counts=counts, bits=None, uneven=uneven)
