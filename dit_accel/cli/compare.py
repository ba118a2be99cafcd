"""`dit-accel compare`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from dit_accel.cli.options import WHAT, How, Ulysses, What, Where, checked, option
from dit_accel.parallel import launcher as ranks

Output = Annotated[
    Path | None, option("Folder to write. \\[named after the prompt]", WHAT, "--output", "-o")
]


def compare(
    what: What, how: How, where: Where, ulysses: Ulysses = 1, output: Output = None
) -> None:
    """Make the same clip dense and accelerated, and report how much faster and how close.

    dit-accel compare "rocket on a blue background"

    dit-accel compare "cat on a red background" --keep 0.5 -o out/cat

    Writes both clips, a side-by-side clip, a contact sheet, report.json and report.html.
    """
    from dit_accel import api
    from dit_accel.cli.progress import Progress
    from dit_accel.cli.session import load, notices, slug
    from dit_accel.generation.comparison import compare
    from dit_accel.generation.loading import find_model
    from dit_accel.media.files import check_folder

    with checked():
        request, config, boost = what.request(), how.config(), how.boost()
        folder = check_folder(output or Path(f"compare-{slug(request)}"))
        if folder.is_file():
            raise ValueError(f"{folder} is a file: give the name of a folder")
        ranks.check(ulysses)
    with Progress() as progress, ExitStack() as stack:
        if not ranks.first(ulysses):  # it takes part, and what it makes is thrown away
            folder = Path(stack.enter_context(TemporaryDirectory()))
        pipe, defaults = load(where, request, config, progress, what.fps, ulysses)
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
                model=find_model(where.model),
                command=shlex.join(["dit-accel", *sys.argv[1:]]),
                progress=progress,
            )
    if ranks.first(ulysses):
        _print(done.data, folder)


def _print(data: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dit_accel.pages.comparison import headline, times

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
