"""Files that change weights instead of holding them: low-rank pairs, differences, replacements."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

from torch import Tensor

from dit_accel.checkpoints.content import Entry
from dit_accel.checkpoints.files import Source

# ending of a name → what it is of which parameter
_ENDINGS = {
    ".lora_A.weight": ("down", "weight"),
    ".lora_A.default.weight": ("down", "weight"),
    ".lora_down.weight": ("down", "weight"),
    ".lora_B.weight": ("up", "weight"),
    ".lora_B.default.weight": ("up", "weight"),
    ".lora_up.weight": ("up", "weight"),
    ".alpha": ("alpha", "weight"),
    ".diff_b": ("diff", "bias"),
    ".diff": ("diff", "weight"),
    ".set_weight": ("set", "weight"),
}


@dataclass
class Edit:
    """What a file says of one parameter: W ← W + alpha/rank · up·down + diff, or W ← set.

    names: those in the file.
    """

    names: list[str]
    down: Entry | None = None
    up: Entry | None = None
    alpha: float | None = None
    diff: Entry | None = None
    set: Entry | None = None

    @property
    def half(self) -> bool:
        """One of a low-rank pair is missing."""
        return (self.down is None) != (self.up is None)

    def change(self) -> Entry:
        """What is added to the weight, float32."""
        parts: list[Entry] = []
        if self.up is not None and self.down is not None:
            shape = (self.up.shape[0], *self.down.shape[1:])
            parts.append(Entry(shape, partial(self._product, self.up, self.down)))
        if self.diff is not None:
            parts.append(self.diff)
        return Entry(parts[0].shape, lambda: reduce(add, (part.load().float() for part in parts)))

    def _product(self, up: Entry, down: Entry) -> Tensor:
        a, b = up.load().float(), down.load().float()
        scale = 1.0 if self.alpha is None else self.alpha / b.shape[0]
        return scale * (a.flatten(1) @ b.flatten(1)).view(a.shape[0], *b.shape[1:])


def are_in(names: Iterable[str]) -> bool:
    """Whether a file with these names changes weights."""
    return any(_ending(name) for name in names)


def read(
    source: Source, rename: Callable[[str], str], alpha: float | None = None
) -> tuple[dict[str, Edit], list[str]]:
    """Parameter's name → edit, and the names that are no edit or half of one.

    rename: from the file's modules to what they are to be called. alpha: of low-rank pairs, where
    neither the file nor its metadata tells; None is their rank, so that up·down counts once.
    """
    edits: dict[str, Edit] = {}
    unused: list[str] = []
    told = _alpha(source.metadata)
    for name, entry in source.entries.items():
        ending = _ending(name)
        if not ending:
            unused.append(name)
            continue
        kind, parameter = _ENDINGS[ending]
        target = rename(f"{name.removesuffix(ending)}.{parameter}")
        edit = edits.setdefault(target, Edit([], alpha=alpha if told is None else told))
        edit.names.append(name)
        setattr(edit, kind, float(entry.load()) if kind == "alpha" else entry)
    for target in [t for t, e in edits.items() if e.half or not (e.up or e.diff or e.set)]:
        unused += edits.pop(target).names
    return edits, unused


def _ending(name: str) -> str:
    return next((ending for ending in _ENDINGS if name.endswith(ending)), "")


def _alpha(metadata: dict[str, str]) -> float | None:
    for key in ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha"):
        if key in metadata:
            return float(metadata[key])
    adapter = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    alphas = {value for key, value in adapter.items() if key.endswith("lora_alpha")}
    return float(alphas.pop()) if len(alphas) == 1 else None
