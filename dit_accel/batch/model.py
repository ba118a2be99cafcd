"""The model of a batch and the checkpoint over it: loaded alike by every kind of worker."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.checkpoints import load_checkpoint
from dit_accel.checkpoints.files import find
from dit_accel.checkpoints.load import read, together
from dit_accel.config import AccelConfig
from dit_accel.generation import loading
from dit_accel.generation.trained import Trained
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from dit_accel.batch.worker import Settings


BESIDE = " + "  # between the files of two experts


def load(
    settings: Settings, device: str | None
) -> tuple[DiffusionPipeline, loading.Defaults, Trained | None]:
    """The pipeline that settings name, what it is called with, and its checkpoint; ValueError in
    one sentence where one cannot be had."""
    pipe, defaults = loading.load_pipeline(settings.model, device, settings.dtype, settings.offload)
    if not settings.checkpoint:
        return pipe, defaults, None
    loaded = load_checkpoint(pipe, *settings.checkpoint, attention=False)
    trained = Trained(tuple(settings.checkpoint), loaded.family, loaded.sampler, loaded.config)
    return pipe, defaults.taking(loaded.arguments), trained


def config_of(files: tuple[str, ...]) -> AccelConfig | None:
    """What a checkpoint was trained for; None: dense attention. ValueError for what is none."""
    return _read(files, tuple(_stamp(path) for path in files))


@lru_cache(maxsize=4)
def _read(files: tuple[str, ...], stamps: tuple[int, ...]) -> AccelConfig | None:
    method = together(read(*files))
    return None if method is None else AccelConfig(method, Schedule(warmup=0))


def _stamp(path: str) -> int:
    """Time of the last change of a file here; 0 of others."""
    found = find(path)
    return os.stat(found).st_mtime_ns if found.is_file() else 0


def listed(text: str) -> list[str]:
    """The files of a job's checkpoint."""
    return [part.strip() for part in text.split(BESIDE) if part.strip()]


def beside(text: str, base: Path) -> str:
    """A job's checkpoint with paths as workers elsewhere find them, relative ones from the folder
    `base`; hub ids as they are."""
    return BESIDE.join(absolute(path, base) for path in listed(text))


def absolute(path: str, base: Path = Path()) -> str:
    """The path as workers elsewhere find it; a hub id as it is."""
    here = base / Path(path).expanduser()
    return str(here.absolute()) if here.exists() else path
