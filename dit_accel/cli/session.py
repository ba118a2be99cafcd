"""What the commands do once their options are read; imported only when one runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dit_accel.cli.options import What, Where, checked
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
from dit_accel.parallel import launcher as ranks
from dit_accel.parallel import ulysses as parallel


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
    where: Where,
    request: Request,
    config: AccelConfig,
    progress: Progress,
    fps: float | None = None,
    ulysses: int = 1,
) -> tuple[Any, Defaults]:
    """The pipeline, once everything that can be refused without it has been."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with checked():
        pick_dtype(where.dtype, pick_device(where.device))
        find_model(where.model)
        progress("loading", 0, None)
        device = ranks.device(where.device) if ulysses > 1 else where.device
        pipe, defaults = load_pipeline(where.model, device, where.dtype, where.offload)
        if ulysses > 1:
            parallel.share(pipe, ulysses, anything=True)
        defaults = replace(defaults, fps=fps or defaults.fps)
        values = arguments(pipe, defaults, request)
        config.schedule.dense_at(0, values.get("num_inference_steps"))
    unknown = unknown_words(pipe, request.prompt)
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        progress.console.print(f"note: this model was never shown the words {words}")
    return pipe, defaults


def open_study(
    what: What,
    config: AccelConfig,
    where: Where,
    output: Path,
    progress: Progress,
    batch: int = 1,
) -> Any:
    """The pipeline of these options, and what is known of it in the folder `output`."""
    from dit_accel.evaluate import Study
    from dit_accel.evaluate.recognition import Recogniser
    from dit_accel.generation.loading import EMBEDDED_NAME

    if output.is_file():
        raise ValueError(f"{output} is a file: give the name of a folder")
    request = what.request()
    pipe, defaults = load(where, request, config, progress)
    return Study(
        pipe,
        defaults,
        request,
        output,
        where.model or EMBEDDED_NAME,
        batch=batch,
        recogniser=Recogniser.of(where.model, pipe._execution_device),
    )


def noted(progress: Progress) -> Callable[[str], None]:
    """Prints a line as it stands, above the bars."""
    options = {"markup": False, "highlight": False, "soft_wrap": True}
    return lambda line: progress.console.print(line, **options)
