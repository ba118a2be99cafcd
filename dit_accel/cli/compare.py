"""`dit-accel compare`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

from dit_accel.cli.options import Metadata, checked, option
from dit_accel.generation.options import HOW, WHAT, How, Kv, Ulysses, What, Where
from dit_accel.parallel import launcher

if TYPE_CHECKING:
    from dit_accel.generation.request import Request

Output = Annotated[
    Path | None, option("Folder to write. \\[named after the prompt]", WHAT, "--output", "-o")
]


Graphs = Annotated[
    bool, option("Both sides as CUDA graphs, for what waits for Python on a GPU.", HOW)
]


def compare(
    what: What,
    how: How,
    where: Where,
    ulysses: Ulysses = 1,
    kv: Kv = None,
    graphs: Graphs = False,
    output: Output = None,
    metadata: Metadata = True,
) -> None:
    """Make the same clip dense and accelerated, and report how much faster and how close.

    dit-accel compare "rocket on a blue background"

    dit-accel compare "fox on a red background" --keep 0.5 -o out/fox

    Writes both clips, a side-by-side clip, a contact sheet, report.json and report.html.
    """
    from dit_accel import api
    from dit_accel.cli.progress import Progress
    from dit_accel.cli.session import free_name, load, notices, slug, typed
    from dit_accel.generation.comparison import check_output, compare
    from dit_accel.generation.loading import find_model

    with checked():
        request, _, boost = what.request(), how.config(), replace(how.boost(), graphs=graphs)
        folder = output or free_name(f"compare-{slug(request)}", "", _is_of(request))
        check_output(folder)
        launcher.check(ulysses, kv)
    with Progress() as progress, ExitStack() as stack:
        if not launcher.first(ulysses):  # it takes part, and what it makes is thrown away
            folder = Path(stack.enter_context(TemporaryDirectory()))
        opened = load(where, request, how, progress, what.fps, ulysses, kv)
        pipe, defaults, config, trained = opened
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
                trained=trained,
                model=find_model(where.model),
                command=typed(),
                metadata=metadata,
                progress=progress,
            )
    if launcher.first(ulysses):
        _print(done.data, folder)


def _is_of(request: Request) -> Callable[[Path], bool]:
    """Whether a folder holds a comparison of this prompt and seed, and may be written again."""
    from dit_accel.inputs.data import read_object

    def same(folder: Path) -> bool:
        try:
            data = read_object(folder / "report.json")
        except ValueError:
            return False
        return (data.get("prompt"), data.get("seed")) == (request.prompt, request.seed)

    return same


def waits(data: dict[str, Any]) -> bool:
    """Whether a report's accelerated steps on a GPU were so short that CUDA graphs may help."""
    from dit_accel.generation.run import is_short

    able = not data["boost"]["graphs"] and data["attention"]["config"].get("prune") is None
    steps = data["times"]["accelerated"]["steps"]
    return data["device"].startswith("cuda") and able and is_short(steps)


def _print(data: dict[str, Any], folder: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    from dit_accel.cli.screen import screen
    from dit_accel.pages import figures
    from dit_accel.pages.comparison import headline, times

    near = data["quality"]
    out = screen()
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    for name in ("dense", f"accelerated ({data['method']})", "speed-up"):
        table.add_column(name, justify="right")
    for name, *values in times(data):
        table.add_row(name, *values, style="bold" if name == "denoising loop" else "")
    out.print(f"\n{headline(data)}\n", style="bold")
    out.print(table, soft_wrap=False)
    out.print(
        f"\nPSNR {near['psnr_mean']:.1f} dB and SSIM {near['ssim_mean']:.3f} to the dense clip; "
        f"{data['kept']:.0%} of the attention work kept"
    )
    for side, memory in data["memory"].items():
        if said := figures.memory(memory):
            out.print(f"{side}: {said}")
    reasons = data["attention"]["unplanned" if data["kept"] < 1 else "fallbacks"]
    for why, count in reasons.items():
        out.print(Text.assemble((f"{count} attention calls ran dense: ", "yellow"), why))
    if waits(data):
        out.print("steps this short may wait for Python, which launches them: --graphs does not")
    names = ", ".join(sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")))
    out.print(f"\n{folder}/  {names}")
    out.print(Text.assemble("open ", (str(folder / "report.html"), "bold"), " in a browser"))
