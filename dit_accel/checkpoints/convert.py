"""A checkpoint as a folder that this package and diffusers read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.checkpoints.content import Checkpoint, Entry
from dit_accel.checkpoints.families.converted import ACCOUNT, CHANGE, PRESET, TOLD
from dit_accel.checkpoints.load import read, together
from dit_accel.config import AccelConfig
from dit_accel.inputs.data import read_object
from dit_accel.media.files import check_folder, check_own
from dit_accel.methods.learned import Learned
from dit_accel.pipelines.denoisers import SLOTS
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from dit_accel.methods import Method


WEIGHTS = "diffusion_pytorch_model"
SHARD = 5 * 2**30  # bytes of a file


def convert(
    *paths: str | Path, out: str | Path, dtype: torch.dtype | None = torch.bfloat16
) -> dict[str, Any]:
    """Write a checkpoint as a folder that `load_checkpoint` reads; returns its account.

    `transformer/` (and `transformer_2/`): weights by diffusers' names, changes of weights as
    `<name>.diff`; `preset.json` and the method's tensors, for `--method`; `checkpoint.json`: what
    it is, how it is sampled, which names were used and which were not.

    Args:
        paths: as in load_checkpoint.
        out: the folder; what is there of an earlier conversion goes, other files stay.
        dtype: of the weights; None leaves each as it is. Learned tensors stay float32.

    Raises ValueError for files that cannot be read, a folder that cannot be written, and one with
    weights in it that no conversion has written.
    """
    final = Path(os.path.realpath(check_folder(out)))
    check_own(final, ACCOUNT, (*SLOTS, PRESET), mark=b'"parts"')
    parts = read(*paths)
    for part in parts:
        part.slot = part.slot or SLOTS[0]
    method = together(parts)
    if isinstance(method, Learned):
        check_own(final, ACCOUNT, (_weights(method),), mark=b'"parts"')
    beside = final if final.is_dir() else final.parent
    folder = beside / f".{final.name}.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        for part in parts:
            _write(folder / (part.slot or SLOTS[0]), part, dtype)
        account = {name: getattr(parts[0], name) for name in TOLD}
        account["parts"] = {
            p.slot: {"whole": p.whole, "used": p.used, "unused": p.unused} for p in parts
        }
        (folder / ACCOUNT).write_text(json.dumps(account, indent=1) + "\n", "utf-8")
        if method is not None:
            _preset(folder, method)
        _take_place(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return account


def _preset(folder: Path, method: Method) -> None:
    config = AccelConfig(method, Schedule(warmup=0)).to_dict()
    if isinstance(method, Learned):
        method.save(folder / _weights(method))
        config["method"]["weights"] = _weights(method)  # found beside the preset
    (folder / PRESET).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _weights(method: Method) -> str:
    """The file of the method's tensors."""
    return f"{method.name}.safetensors"


def _write(folder: Path, part: Checkpoint, dtype: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    entries = part.weights | {f"{name}{CHANGE}": e for name, e in part.changes.items()}
    places: dict[str, str] = {}
    total = 0
    for number, names in enumerate(_shards(entries), 1):
        file = f"{WEIGHTS}-{number:05d}.safetensors"
        tensors = {name: _as(entries[name], dtype) for name in names}
        total += sum(x.nbytes for x in tensors.values())
        save_file(tensors, folder / file, {"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{WEIGHTS}.safetensors.index.json").write_text(
        json.dumps(index, indent=1) + "\n", "utf-8"
    )


def _as(entry: Entry, dtype: torch.dtype | None) -> torch.Tensor:
    x = entry.load()
    return x.to(dtype if dtype is not None and x.is_floating_point() else x.dtype).contiguous()


def _shards(entries: dict[str, Entry]) -> Iterator[list[str]]:
    """Names of about SHARD bytes each, counted as two bytes a number."""
    names: list[str] = []
    size = 0
    for name, entry in entries.items():
        bytes_ = 2 * torch.Size(entry.shape).numel()
        if names and size + bytes_ > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += bytes_
    if names:
        yield names


def _take_place(folder: Path, final: Path) -> None:
    """Each piece goes where it belongs, those of an earlier conversion go, and all else stays."""
    final.mkdir(parents=True, exist_ok=True)
    pieces = sorted(folder.iterdir())
    for name in _earlier(final) - {piece.name for piece in pieces}:
        _remove(final / name)
    for piece in pieces:
        if piece.is_dir():
            _remove(final / piece.name)
        os.replace(piece, final / piece.name)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _earlier(final: Path) -> set[str]:
    """What an earlier conversion may have written in this folder."""
    if not (final / ACCOUNT).is_file():
        return set()
    names = {*SLOTS, PRESET}
    with suppress(OSError, ValueError, LookupError, TypeError):
        method = read_object(final / PRESET)["method"]
        if method["weights"] == f"{method['name']}.safetensors":
            names.add(method["weights"])
    return names
