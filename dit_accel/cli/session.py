"""What the commands do once their options are read; imported only when one runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import dit_accel
from dit_accel.cli.options import Common, checked
from dit_accel.cli.progress import Progress
from dit_accel.config import AccelConfig
from dit_accel.generation.loading import (
    Defaults,
    find_model,
    load_pipeline,
    pick_device,
    pick_dtype,
)
from dit_accel.generation.request import Request, arguments, unknown_words
from dit_accel.methods import find
from dit_accel.parallel import launcher as ranks
from dit_accel.parallel import ulysses as parallel


def run_methods() -> None:
    """`dit-accel methods`."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("method", "what it does", "presets", "paper", "fine-tuning"):
        table.add_column(column)
    for name, info in dit_accel.methods().items():
        presets = ", ".join(f"{name}:{p}" for p in find(name).presets)
        tuned = "needed" if info.finetuning else "no"
        table.add_row(f"[bold]{name}[/bold]", info.description, presets, info.paper, tuned)
    Console().print(table)


class _Notices(logging.Handler):
    """Prints each sentence once."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.said:
            self.said.add(text)
            self.console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def notices(progress: Progress) -> Iterator[None]:
    """What the library announces inside this block is printed."""
    logger, handler = logging.getLogger("dit_accel"), _Notices(progress.console)
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def slug(request: Request) -> str:
    """A file name from the prompt: "rocket-on-a-blue-background", with the seed when not 0."""
    words = re.findall(r"[a-z0-9]+", request.prompt.lower()) or ["clip"]
    return "-".join(words)[:60].strip("-") + (f"-{request.seed}" if request.seed else "")


def load(
    common: Common, request: Request, config: AccelConfig, progress: Progress
) -> tuple[Any, Defaults]:
    """The pipeline, once everything that can be refused without it has been."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with checked():
        pick_dtype(common.dtype, pick_device(common.device))
        find_model(common.model)
        progress("loading", 0, None)
        device = ranks.device(common.device) if common.ulysses > 1 else common.device
        pipe, defaults = load_pipeline(common.model, device, common.dtype, common.offload)
        if common.ulysses > 1:
            parallel.share(pipe, common.ulysses, anything=True)
        defaults = replace(defaults, fps=common.fps or defaults.fps)
        values = arguments(pipe, defaults, request)
        config.schedule.dense_at(0, values.get("num_inference_steps"))
    unknown = unknown_words(pipe, request.prompt)
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        progress.console.print(f"note: this model was never shown the words {words}")
    return pipe, defaults


def open_study(common: Common, prompt: str, output: Path, progress: Any, batch: int = 1) -> Any:
    """The pipeline of these options, and what is known of it in the folder `output`."""
    from dit_accel.evaluate import Study
    from dit_accel.evaluate.recognition import Recogniser
    from dit_accel.generation.loading import EMBEDDED_NAME

    if output.is_file():
        raise ValueError(f"{output} is a file: give the name of a folder")
    common = replace(common, prompt=prompt)
    request = common.request()
    pipe, defaults = load(common, request, common.config(), progress)
    return Study(
        pipe,
        defaults,
        request,
        output,
        common.model or EMBEDDED_NAME,
        batch=batch,
        recogniser=Recogniser.of(common.model, pipe._execution_device),
    )
