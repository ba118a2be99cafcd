"""The command behind `python app.py` and `dit-accel app`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from dit_accel.app.ask import Limits


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser(
        prog="app.py",
        description="A page that generates the same clip two ways, from the same noise, and "
        "compares them.",
    )
    words.add_argument("--host", default="127.0.0.1", help="address to listen on [127.0.0.1]")
    words.add_argument("--port", type=int, default=7860, help="port to listen on [7860]")
    words.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="ID",
        help="offer this folder or Hugging Face id beside the embedded model; repeatable",
    )
    words.add_argument("--device", help="cpu, cuda, cuda:1 or mps [a GPU when there is one]")
    words.add_argument("--dtype", help="bf16, fp16 or fp32 [bf16 on CUDA, fp32 elsewhere]")
    words.add_argument("--offload", action="store_true", help="keep idle parts off the GPU")
    words.add_argument(
        "--public",
        action="store_true",
        help="for a page strangers can reach: tighter limits, and no model but those offered",
    )
    words.add_argument("--queue", type=int, help="visitors who may wait at a time [8]")
    words.add_argument("--open", action="store_true", help="open the page in a browser")
    words.add_argument(
        "--make-examples",
        nargs="*",
        metavar="NAME",
        help="generate the stored examples (these, or all) anew, and stop",
    )
    return words


def limits(options: argparse.Namespace) -> Limits:
    """What the page allows under these options."""
    models = tuple(options.model)
    base = Limits.for_public(models) if options.public else Limits(models=models)
    if options.queue is None:
        return base
    if options.queue < 1:
        raise ValueError(f"--queue is a number of visitors ≥ 1, not {options.queue}")
    return Limits(**{**vars(base), "queue": options.queue})


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C; 2 for options that cannot be served."""
    words = parser()
    options = words.parse_args(argv)
    try:
        bounds = limits(options)
        return _serve(options, bounds)
    except (ValueError, OSError) as error:
        words.error(str(error))
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        words.error('the page needs Gradio: pip install "dit-accel[app]"')


def _serve(options: argparse.Namespace, bounds: Limits) -> int:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from dit_accel.app.studio import Studio
    from dit_accel.generation.loading import load_pipeline, pick_device, pick_dtype

    pick_dtype(options.dtype, pick_device(options.device))
    studio = Studio(
        partial(load_pipeline, device=options.device, dtype=options.dtype, offload=options.offload)
    )
    if options.make_examples is not None:
        from dit_accel.app import examples

        examples.make(studio, options.make_examples)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="dit-accel-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder, "gradio"))
        from dit_accel.app import server

        print(f"dit_accel: http://{options.host}:{options.port}", file=sys.stderr)
        server.serve(studio, bounds, Path(folder, "jobs"), options)
    return 0
