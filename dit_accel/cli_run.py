"""What the commands do once their options are read; imported only when one runs."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import dit_accel
from dit_accel import announce, api, parallel, ranks, video
from dit_accel.cli_options import Common, checked
from dit_accel.config import AccelConfig
from dit_accel.generate import Request, arguments, generate, unknown_words
from dit_accel.html import headline, seconds, time_rows
from dit_accel.loading import Defaults, find_model, load_pipeline, pick_device, pick_dtype
from dit_accel.methods import find
from dit_accel.progress import Progress
from dit_accel.schedule import Plan

MANY = 2**20  # layers: how many there are is the adapter's to say, here only steps are checked


def run_generate(common: Common, output: Path | None) -> None:
    """`dit-accel generate`."""
    with checked():
        request, config, boost = common.request(), common.config(), common.boost()
        if output is not None:
            video.check_target(output, moving=output.suffix.lower() not in video.IMAGE)
        ranks.check(common.ulysses)
    with Progress() as progress:
        pipe, defaults = load(common, request, config, progress)
        with checked():
            boost.switch_on(pipe)
            handle = api.accelerate(pipe, config)
        with notices(progress):
            result = generate(pipe, defaults, request, progress)
        if not ranks.first(common.ulysses):
            return
        moving = len(result.frames) > 1
        target = output or Path(f"{slug(request)}.{'mp4' if moving else 'png'}")
        progress("writing", 0, None)
        video.save(target, result.frames, defaults.fps)
    count, height, width = result.frames.shape[:3]
    times = result.times
    screen = Console(highlight=False, soft_wrap=True)
    screen.print(
        f"[bold]{escape(str(target))}[/bold]  {width}×{height}, {count} frame{'s' * moving}"
    )
    screen.print(
        f"{seconds(times.total)}: text {seconds(times.encode)}, denoising "
        f"{seconds(times.denoise)}, decoding {seconds(times.decode)}"
    )
    screen.print(str(handle.report()), markup=False)


def run_compare(common: Common, output: Path | None) -> None:
    """`dit-accel compare`."""
    with checked():
        request, config, boost = common.request(), common.config(), common.boost()
        folder = video.check_folder(output or Path(f"compare-{slug(request)}"))
        if folder.is_file():
            raise ValueError(f"{folder} is a file: give the name of a folder")
        ranks.check(common.ulysses)
    from dit_accel.compare import compare

    with Progress() as progress, ExitStack() as stack:
        if not ranks.first(common.ulysses):  # it takes part, and what it makes is thrown away
            folder = Path(stack.enter_context(TemporaryDirectory()))
        pipe, defaults = load(common, request, config, progress)
        with checked():
            boost.check(pipe)
            api.accelerate(pipe, config).restore()
        with notices(progress):
            done = compare(
                pipe,
                defaults,
                request,
                config,
                folder,
                boost=boost,
                model=find_model(common.model),
                command=shlex.join(["dit-accel", *sys.argv[1:]]),
                progress=progress,
            )
    if ranks.first(common.ulysses):
        _print_comparison(done.data, folder)


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
    logger, handler = logging.getLogger(announce.__name__), _Notices(progress.console)
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
        Plan(config.schedule, config.method.keep, MANY).action(
            0, values.get("num_inference_steps"), 0
        )
    unknown = unknown_words(pipe, request.prompt)
    if unknown:
        words = ", ".join(repr(word) for word in unknown)
        progress.console.print(f"note: this model was never shown the words {words}")
    return pipe, defaults


def _print_comparison(data: dict[str, Any], folder: Path) -> None:
    near = data["quality"]
    screen = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("dense", f"accelerated ({data['method']})", "speed-up"):
        table.add_column(name, justify="right")
    for name, *values in time_rows(data):
        table.add_row(name, *values, style="bold" if name == "denoising loop" else "")
    screen.print(f"\n[bold]{headline(data)}[/bold]\n")
    screen.print(table)
    screen.print(
        f"\nPSNR {near['psnr_mean']:.1f} dB and SSIM {near['ssim_mean']:.3f} to the dense clip; "
        f"{data['kept']:.0%} of the attention work kept"
    )
    reasons = data["attention"]["unplanned" if data["kept"] < 1 else "fallbacks"]
    for why, count in reasons.items():
        screen.print(f"[yellow]{count} attention calls ran dense:[/yellow] {escape(why)}")
    names = ", ".join(sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
    screen.print(f"\n{folder}/  {names}", soft_wrap=True, markup=False)
    screen.print(
        f"open [bold]{escape(str(folder / 'report.html'))}[/bold] in a browser", soft_wrap=True
    )
