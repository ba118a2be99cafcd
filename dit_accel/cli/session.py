"""What the commands do once their options are read; imported only when one runs."""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console

from dit_accel.checkpoints import load_checkpoint
from dit_accel.checkpoints.files import find
from dit_accel.cli.options import checked
from dit_accel.cli.progress import Progress
from dit_accel.config import AccelConfig
from dit_accel.generation.loading import (
    Defaults,
    find_model,
    load_pipeline,
    pick_device,
    pick_dtype,
)
from dit_accel.generation.offload import Offload
from dit_accel.generation.options import How, What, Where
from dit_accel.generation.request import Request, arguments, unknown_words
from dit_accel.generation.trained import Trained
from dit_accel.media.files import check_folder, check_own
from dit_accel.media.lock import held
from dit_accel.media.names import from_text
from dit_accel.methods.dense import Dense
from dit_accel.parallel import launcher
from dit_accel.parallel.sharing import share
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from dit_accel.evaluate import Study


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
            self.console.print(f"note: {text}")


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
    name = from_text(request.prompt) or "clip"
    return f"{name}-{request.seed}" if request.seed else name


def free_name(stem: str, suffix: str, mine: Callable[[Path], bool]) -> Path:
    """The first of stem, stem-2, stem-3 … that is free, or is `mine` to replace."""
    numbers = (f"-{n}" if n > 1 else "" for n in itertools.count(1))
    paths = (Path(f"{stem}{number}{suffix}") for number in numbers)
    return next(path for path in paths if not os.path.lexists(path) or mine(path))


def typed() -> str:
    """The command line, as it would be typed again."""
    return shlex.join(["dit-accel", *sys.argv[1:]])


class Opened(NamedTuple):
    """A pipeline, what it is called with, what it runs, and the checkpoint in it."""

    pipe: DiffusionPipeline
    defaults: Defaults
    config: AccelConfig
    trained: Trained | None


def load(
    where: Where,
    request: Request,
    how: How,
    progress: Progress,
    fps: float | None = None,
    ulysses: int = 1,
    kv: str | None = None,
) -> Opened:
    """The pipeline, once everything that can be refused without it has been."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with checked():
        target = pick_device(where.device)
        pick_dtype(where.dtype, target)
        if moving := Offload.named(where.offload):
            moving.check(target)
        find_model(where.model)
        config, trained = how.config(), None
        if kv is not None and config.prune is not None:
            raise ValueError("pruned tokens are shared by heads: leave --kv or --prune out")
        for path in where.checkpoint or ():
            find(path)
        progress("loading", 0, None)
        device = launcher.device(where.device) if ulysses > 1 else where.device
        pipe, defaults = load_pipeline(where.model, device, where.dtype, where.offload)
        if where.checkpoint:
            defaults, config, trained = _into(pipe, defaults, where, request, how, progress)
        if ulysses > 1:
            share(pipe, ulysses, kv=kv, anything=True)
        defaults = replace(defaults, fps=fps or defaults.fps)
        values = arguments(pipe, defaults, request)
        config.schedule.dense_at(0, values.get("num_inference_steps"))
    unknown = unknown_words(pipe, request.prompt)
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        progress.console.print(f"note: this model was never shown the words {words}")
    return Opened(pipe, defaults, config, trained)


def _into(
    pipe: DiffusionPipeline,
    defaults: Defaults,
    where: Where,
    request: Request,
    how: How,
    progress: Progress,
) -> tuple[Defaults, AccelConfig, Trained]:
    """The checkpoint's weights, sampler and arguments; attention is the command's to set."""
    files = where.checkpoint or ()
    own = request.sampler is None
    loaded = load_checkpoint(pipe, *files, sampler=own, attention=False)
    for line in str(loaded).splitlines():
        progress.console.print(line, markup=False)
    trained = Trained(tuple(files), loaded.family, loaded.sampler, loaded.config)
    as_trained = loaded.config or AccelConfig(Dense(), Schedule(warmup=0))
    config = how.config(as_trained)
    given = {"method": how.method, "speed": how.speed, "keep": how.keep}
    for name, asked in (given | {"sampler": request.sampler}).items():
        if asked is not None:
            progress.console.print(f"note: --{name} {asked} in place of what was trained")
    return defaults.taking(loaded.arguments), config, trained


@contextmanager
def open_study(
    what: What,
    how: How,
    where: Where,
    output: Path,
    progress: Progress,
    files: Sequence[str],
    batch: int = 1,
) -> Iterator[Study]:
    """The pipeline of these options, and what is known of it in the folder `output`, which is this
    process's for the length of the block.

    files: names that will be written there; ValueError where others' files have them.
    """
    from dit_accel.evaluate import Study
    from dit_accel.evaluate.scenes import recogniser
    from dit_accel.generation.loading import EMBEDDED_NAME

    if batch < 1:
        raise ValueError(f"batch is a number of clips ≥ 1, not {batch}")
    check_own(check_folder(output), "cells.jsonl", files)
    request = what.request()
    opened = load(where, request, how, progress)
    pipe, name = opened.pipe, where.model or EMBEDDED_NAME
    with held(output):
        yield Study(
            pipe,
            opened.defaults,
            request,
            output,
            name if opened.trained is None else f"{name} with {opened.trained}",
            batch=batch,
            recogniser=recogniser(where.model),  # small steps: 0.3 s a clip on one core
            trained=None if opened.trained is None else opened.config,
        )


def noted(progress: Progress) -> Callable[[str], None]:
    """Prints a line as it stands, above the bars."""
    return progress.console.print
