"""A row's own transformer in a stock pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dit_accel.evaluate.rows import Row

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class Weights:
    """Loads the transformers that rows name; the last one is kept."""

    def __init__(self) -> None:
        self._last: tuple[str, torch.nn.Module] | None = None

    @contextmanager
    def of(self, pipe: DiffusionPipeline, row: Row) -> Iterator[None]:
        """The row's own transformer in the pipeline, where it has one."""
        if row.transformer is None:
            yield
            return
        stock = pipe.transformer
        if self._last is None or self._last[0] != row.transformer:
            self._last = None  # the old goes before the new comes
            tuned = with_weights(stock, Path(row.transformer))
            self._last = row.transformer, tuned.to(pipe._execution_device).eval()
        pipe.transformer = self._last[1]
        try:
            yield
        finally:
            pipe.transformer = stock


def with_weights(stock: ModelMixin, folder: Path) -> torch.nn.Module:
    """A transformer of this folder's weights, or of the stock ones and this folder's LoRA."""
    if (folder / "config.json").is_file():
        return type(stock).from_pretrained(folder, torch_dtype=stock.dtype)
    tuned = copy.deepcopy(stock)
    tuned.load_lora_adapter(str(folder), weight_name="pytorch_lora_weights.safetensors")
    tuned.fuse_lora()
    return tuned
