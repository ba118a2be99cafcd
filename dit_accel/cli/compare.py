"""`dit-accel compare`."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dit_accel import api
from dit_accel.cli.options import Common, checked
from dit_accel.cli.progress import Progress
from dit_accel.cli.session import load, notices, slug
from dit_accel.generation.loading import find_model
from dit_accel.media.files import check_folder
from dit_accel.pages.comparison import headline, times
from dit_accel.parallel import launcher as ranks


def run_compare(common: Common, output: Path | None) -> None:
    """`dit-accel compare`."""
    with checked():
        request, config, boost = common.request(), common.config(), common.boost()
        folder = check_folder(output or Path(f"compare-{slug(request)}"))
        if folder.is_file():
            raise ValueError(f"{folder} is a file: give the name of a folder")
        ranks.check(common.ulysses)
    from dit_accel.generation.comparison import compare

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


def _print_comparison(data: dict[str, Any], folder: Path) -> None:
    near = data["quality"]
    screen = Console(highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("dense", f"accelerated ({data['method']})", "speed-up"):
        table.add_column(name, justify="right")
    for name, *values in times(data):
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
