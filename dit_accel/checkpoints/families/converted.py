"""What `dit-accel convert` wrote: weights by diffusers' names, a preset, and checkpoint.json."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dit_accel.checkpoints.content import Checkpoint
from dit_accel.checkpoints.files import Source
from dit_accel.config import resolve
from dit_accel.inputs.data import read_object
from dit_accel.methods.base import Method
from dit_accel.methods.learned import SECOND, Learned

ACCOUNT, PRESET, CHANGE = "checkpoint.json", "preset.json", ".diff"
TOLD = ("family", "sampler", "shifts", "arguments", "boundary", "notes")


def recognise(source: Source) -> bool:
    """checkpoint.json above the transformer's folder."""
    return (source.path.parent / ACCOUNT).is_file()


def read(source: Source) -> Checkpoint:
    """What the file said that the folder was made of."""
    folder = source.path.parent
    account = read_object(folder / ACCOUNT)
    parts = account.get("parts")
    if not isinstance(parts, dict) or source.slot not in parts:
        raise ValueError(
            f"{folder / ACCOUNT} names no part {source.path.name}: give the folder as convert "
            "wrote it, or, where that file is not convert's, move it away"
        )
    part = parts[source.slot]
    weights = {n: e for n, e in source.entries.items() if not n.endswith(CHANGE)}
    changes = {n.removesuffix(CHANGE): e for n, e in source.entries.items() if n.endswith(CHANGE)}
    method, learned = _method(folder, source.slot)
    told = {name: account[name] for name in TOLD}
    told["shifts"] = told["shifts"] and tuple(told["shifts"])
    return Checkpoint(
        weights=weights,
        changes=changes,
        learned=learned,
        method=method,
        slot=source.slot,
        whole=part["whole"],
        used=list(source),
        unused=part["unused"],
        **told,
    )


def _method(folder: Path, slot: str | None) -> tuple[Method | None, dict[str, Tensor]]:
    if not (folder / PRESET).is_file():
        return None, {}
    method = resolve(folder / PRESET).method
    if not isinstance(method, Learned):
        return method, {}
    second = slot == "transformer_2"
    mine = {n: x for n, x in method.tensors().items() if n.startswith(SECOND) == second}
    return method.with_weights({}), {n.removeprefix(SECOND): x for n, x in mine.items()}
