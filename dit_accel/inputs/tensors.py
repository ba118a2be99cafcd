"""Safetensors files: opened in one place, so that a damaged one is named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Tensors(Protocol):
    """What is used of an open safetensors file."""

    def keys(self) -> list[str]: ...

    def metadata(self) -> dict[str, str] | None: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...

    def get_slice(self, name: str) -> Slice: ...


class Slice(Protocol):
    """A tensor that is not read yet."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...


@contextmanager
def open_tensors(path: str | Path, what: str = "weights file") -> Iterator[Tensors]:
    """The file, open for PyTorch; ValueError names one that is missing, cut off or no such file."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise ValueError(f"there is no {what} {path}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{what} {path} is cut off or damaged ({why}): copy it again") from None


def check_folder(folder: Path) -> None:
    """ValueError for the first weights file of a pipeline's folder that cannot be opened."""
    for path in sorted(folder.glob("*/*.safetensors")):
        with open_tensors(path):
            pass
