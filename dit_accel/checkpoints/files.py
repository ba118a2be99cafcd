"""Tensors by name, in .safetensors, .pth (weights only: no code is run), folders, on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.checkpoints.content import Entry
from dit_accel.inputs.data import read_object
from dit_accel.inputs.tensors import open_tensors
from dit_accel.pipelines.denoisers import SLOTS

_NESTS = ("state_dict", "model", "module", "net", "ema")  # where .pth files keep their tensors
SIDECAR = "fastvideo_inference.json"
_WHAT = "checkpoint"


@dataclass
class Source:
    """The tensors of one transformer, read when asked for.

    Args:
        path: of the file or folder.
        entries: name → tensor.
        metadata: of a safetensors file.
        config: config.json beside the tensors. sidecar: FastVideo's account of the training.
        slot: the folder's name, where it is one of a pipeline's transformers.
        strangers: what the file holds beside tensors.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sidecar: dict[str, Any] = field(default_factory=dict)
    slot: str | None = None
    strangers: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    @property
    def title(self) -> str:
        """The names of the file and of what it lies in, in lower case: they tell what tensors do
        not. Of a snapshot of the hub its repository is among them."""
        return "/".join(self.path.parts[-4:]).lower()

    def says(self, word: str) -> bool:
        """Whether the title holds this word, not as a part of a longer one."""
        return re.search(rf"(?<![a-z]){word}(?![a-z])", self.title) is not None


def find(path: str | Path) -> Path:
    """The file or folder of a path or a Hugging Face id (name/model, name/model/file); ValueError
    where there is none."""
    here = Path(path).expanduser()
    if here.exists():
        return here
    parts = str(path).split("/")
    if len(parts) < 2 or str(path).startswith((".", "/", "~")):
        raise ValueError(f"there is no checkpoint {path}: give a file, a folder or a hub id")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download

        if len(parts) > 2:
            return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
        wanted = ["transformer*/*", "*.safetensors", "*.json"]
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:  # which one the hub's client raises depends on its version
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"there is no file or folder {path}, and the hub gives none: {why}"
        ) from error


def sources(path: Path) -> list[Source]:
    """The transformers that a file, a transformer's folder or a pipeline's folder holds."""
    if path.is_file():
        return [_with_company(_file(path), path.parent)]
    inner = [path / slot for slot in SLOTS if (path / slot).is_dir()]
    found = [_with_company(_folder(folder), folder, path) for folder in inner or [path]]
    for source in found:
        source.slot = source.path.name if source.path.name in SLOTS else None
    return found


def _with_company(source: Source, folder: Path, above: Path | None = None) -> Source:
    source.config = _json(folder / "config.json")
    places = (folder, above or folder, folder.parent)
    source.sidecar = next((found for p in places if (found := _json(p / SIDECAR))), {})
    return source


def _json(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _file(path: Path) -> Source:
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return _pickle(path)
    raise ValueError(f"{path} is no checkpoint: it ends neither in .safetensors nor in .pth")


def _folder(folder: Path) -> Source:
    """All tensors of a folder: those that its index names, or, without one, those of all files."""
    files = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        lost = [name for name in names if not (folder / name).is_file()]
        if lost:
            raise ValueError(f"{folder} lacks {', '.join(lost)}, which {index.name} names")
        files = [folder / name for name in names]
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file")
    found = Source(folder, {})
    for file in files:
        part = _safetensors(file)
        twice = sorted(set(part.entries) & set(found.entries))
        if twice:
            raise ValueError(f"{folder} holds {twice[0]} in two files: leave one of them there")
        found.entries |= part.entries
        found.metadata |= part.metadata
    return found


def _safetensors(path: Path) -> Source:
    with open_tensors(path, _WHAT) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
        metadata = dict(file.metadata() or {})
    entries = {name: Entry(shape, partial(_tensor, path, name)) for name, shape in shapes.items()}
    return Source(path, entries, metadata)


def _tensor(path: Path, name: str) -> Tensor:
    with open_tensors(path, _WHAT) as file:
        return file.get_tensor(name)


def _pickle(path: Path) -> Source:
    """A file of torch.save; only tensors and plain containers are let in."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch raise what they like
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read as weights alone, and nothing else is run: {why}"
        ) from error
    for nest in _NESTS:
        inner = content.get(nest) if isinstance(content, Mapping) else None
        if isinstance(inner, Mapping) and any(isinstance(x, Tensor) for x in inner.values()):
            content = inner
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not tensors by name")
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    strangers = sorted(str(k) for k in content if k not in tensors)
    return Source(path, {k: Entry.of(v) for k, v in tensors.items()}, strangers=strangers)
