"""What a worker process runs: `python -m dit_accel.batch.child FOLDER DEVICE THREADS`."""

from __future__ import annotations

import sys

import torch

from dit_accel.batch.manifest import Manifest
from dit_accel.batch.model import load
from dit_accel.batch.worker import (
    DEVICE_LOST,
    DISK_FULL,
    NO_MODEL,
    DeviceLost,
    Settings,
    Worker,
)
from dit_accel.batch.writer import FULL


def serve(folder: str, device: str, threads: int) -> int:
    """Work off the manifest of a folder; an exit code of dit_accel.batch.worker, or 0.

    device: a name, or "auto". threads: of the CPU; 0 leaves PyTorch's choice.
    """
    if threads:
        torch.set_num_threads(threads)
    manifest = Manifest(folder)
    settings = Settings(**manifest.get("settings"))
    try:
        opened = load(settings, None if device == "auto" else device)
    except ValueError as error:
        manifest.give_up(str(error))
        return NO_MODEL
    try:
        stopped = Worker(manifest, *opened, settings, child=True).run()
    except DeviceLost:
        return DEVICE_LOST
    return DISK_FULL if stopped == FULL else 0


if __name__ == "__main__":
    raise SystemExit(serve(sys.argv[1], sys.argv[2], int(sys.argv[3])))
