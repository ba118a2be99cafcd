"""The page from its start to Ctrl-C: what `dit-accel app` does."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dit_accel.app.ask import Limits
from dit_accel.inputs.fields import within

if TYPE_CHECKING:
    from dit_accel.app.studio import Studio


def studio(
    device: str | None = None,
    dtype: str | None = None,
    offload: bool = False,
    metadata: bool = True,
) -> Studio:
    """What runs the clips; ValueError for a device or a dtype that is none here."""
    from dit_accel.app.studio import Studio
    from dit_accel.generation.loading import load_pipeline, pick_device, pick_dtype

    pick_dtype(dtype, pick_device(device))
    return Studio(partial(load_pipeline, device=device, dtype=dtype, offload=offload), metadata)


def serve(
    studio: Studio,
    limits: Limits,
    host: str = "127.0.0.1",
    port: int = 7860,
    browser: bool = False,
) -> None:
    """Serve the page until Ctrl-C; `browser` opens it. OSError where the port is taken,
    ModuleNotFoundError without Gradio."""
    within("port", port, 1, 65535)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="dit-accel-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "gradio"))
        from dit_accel.app import server

        print(f"dit_accel: http://{host}:{port}", file=sys.stderr)
        server.serve(studio, limits, Path(folder, "jobs"), host, port, browser)
