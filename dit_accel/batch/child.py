"""What a worker process runs: `python -m dit_accel.batch.child FOLDER DEVICE THREADS`."""

from __future__ import annotations

import sys

import torch

from dit_accel.batch.manifest import Manifest
from dit_accel.batch.worker import (
    DEVICE_LOST,
    DISK_FULL,
    NO_MODEL,
    DeviceLost,
    Settings,
    Worker,
)
from dit_accel.batch.writer import FULL
from dit_accel.loading import load_pipeline


def main() -> None:
    """Serve the manifest of a folder. Exit codes are those of dit_accel.batch.worker."""
    folder, device, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if threads:
        torch.set_num_threads(threads)
    manifest = Manifest(folder)
    settings = Settings(**manifest.get("settings"))
    try:
        pipe, defaults = load_pipeline(
            settings.model, None if device == "auto" else device, settings.dtype, settings.offload
        )
    except ValueError as error:
        manifest.set("stop", str(error))
        raise SystemExit(NO_MODEL) from None
    try:
        stopped = Worker(manifest, pipe, defaults, settings, child=True).run()
    except DeviceLost:
        raise SystemExit(DEVICE_LOST) from None
    if stopped == FULL:
        raise SystemExit(DISK_FULL)


if __name__ == "__main__":
    main()
