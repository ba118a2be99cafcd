"""`dit-accel profile`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from dit_accel.cli.options import checked, option, words
from dit_accel.generation.options import HOW, WHAT, How, What, Where

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dit_accel.methods.budget import Profile

# Backgrounds of the map, from no error to the largest.
_COLOURS = ("grey11", "dark_blue", "blue3", "purple4", "dark_magenta", "red3", "orange3", "yellow3")
SHOWN = 0.12  # the keep whose errors the map shows, one of those measured

Output = Annotated[Path, option("File to write. \\[profile.json]", WHAT, "--output", "-o")]


Try = Annotated[
    list[str] | None, option("A selector to try, once for each. \\[means, sub]", HOW, "--try")
]
Sorts = Annotated[
    str | None, option("Orders of each head to try, such as none,time,tile.", HOW, "--sorts")
]

Linear = Annotated[bool, option("Try linear attention in each layer, too.", HOW, "--linear")]
Mass = Annotated[
    bool, option("The attention that chosen blocks hold, too, for --heads @mass0.9.", HOW, "--mass")
]
SHARE = 0.75  # of the layers that the command shown makes linear, as MiniCPM-SALA's


def profile(
    what: What,
    how: How,
    where: Where,
    tried: Try = None,
    sorts: Sorts = None,
    linear: Linear = False,
    mass: Mass = False,
    output: Output = Path("profile.json"),
) -> None:
    """Show where sparse attention errs, by layer, head and step, in one dense generation.

    dit-accel profile "rocket on a blue background" -o profile.json

    dit-accel generate "a cat" --method shared --select sub --heads profile.json@0.1

    dit-accel profile "rocket on a blue background" --try sub --try slash --try nearest

    dit-accel generate "a cat" --method pooled --select "per-head(profile.json)"

    dit-accel profile "rocket on a blue background" --sorts none,time,tile,hilbert

    dit-accel profile "rocket on a blue background" --linear

    dit-accel finetune --linear-layers profile.json@0.75 --out out/sala
    """
    from dit_accel.cli.progress import Progress
    from dit_accel.cli.screen import screen
    from dit_accel.cli.session import load, notices
    from dit_accel.config import DEFAULT
    from dit_accel.evaluate.profile import KEEPS, SELECTORS, check_sorts, check_tried, measure
    from dit_accel.generation.boost import STOCK

    with checked():
        request, boost = what.request(), how.boost()
        if replace(boost, lora=None) != STOCK or how.config().prune is not None:
            raise ValueError(
                "profile looks at a dense generation of the model, with its LoRA or without: leave "
                "compile, step cache, quantize, prune and speed out"
            )
        selectors, orders = check_tried(tried or SELECTORS), check_sorts(words(sorts or ""))
        _check_output(output)
    with Progress() as progress:
        opened = load(where, request, how, progress, what.fps)
        pipe, defaults, config, _ = opened
        with notices(progress), checked():
            boost.check(pipe)
            tries = (KEEPS, selectors, orders, linear, mass)
            with boost.adapted(pipe):
                found = measure(pipe, defaults, request, config, *tries, progress)
    found.save(output)
    show(found, screen())
    for line in commands(found, how.method or DEFAULT, output):
        screen().print(f"\n{line}", soft_wrap=True)


def _check_output(output: Path) -> None:
    """ValueError for a file that cannot be written, and for one that is no profile."""
    from dit_accel.media.files import check_place
    from dit_accel.methods.budget import Profile

    if not output.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {output.parent}: give a file in one that exists")
    check_place(output)
    if output.exists():
        try:
            Profile.load(output)
        except ValueError:
            raise ValueError(
                f"{output} is there and is no profile of ours: give another name with -o"
            ) from None


def commands(found: Profile, method: str, output: Path) -> list[str]:
    """What a profile is for, each as a command line."""
    lines = []
    for choice in map(shlex.quote, [best(found), f"per-head({output})"][: len(found.heads)]):
        said = f"--method {method} --select {choice} --heads {output}@{SHOWN:g}"
        lines.append(f"dit-accel generate PROMPT {said}")
    if found.sorts:
        lines.append(f"dit-accel generate PROMPT --sort {shlex.quote(f'per-head({output})')}")
    if found.mass:
        said = f"--method {method} --select {shlex.quote(best(found))} --heads {output}@mass0.9"
        lines.append(f"dit-accel generate PROMPT {said}")
    if len(found.layers) > 1:
        half = ",".join(map(str, found.leaders((len(found.layers) + 2) // 2)))
        lines.append(f"dit-accel generate PROMPT --method {method} --reuse layers:{half}")
    if found.linear:
        lines.append(f"dit-accel finetune --linear-layers {output}@{SHARE:g} --out FOLDER")
    return lines


def best(found: Profile) -> str:
    """The selector with the least error at `SHOWN`, a keep for each head."""
    return min(found.heads, key=lambda name: found.gain(SHOWN, name)[1])


def show(found: Profile, console: Console) -> None:
    """Maps of heads × layers and of steps, and what a choice for each head brings."""
    name = best(found)
    curves = found.curves(name)
    errors = {place: curve[SHOWN] ** 0.5 for place, curve in curves.items()}
    chosen = dict(found.schedule_heads(SHOWN, name))
    title = f"{found.method}/{name}: error at keep {SHOWN:.0%}, and keep of each head at that total"
    console.print(_map(title, errors, chosen, found.overlap))
    console.print(_gains("selector", found))
    if found.sorts:
        console.print(_gains("order", replace(found, heads=found.sorts)))
    steps = {int(step): curve[str(SHOWN)] for step, curve in found.steps[name].items()}
    words = ", ".join(f"{step}: {error:.2f}" for step, error in sorted(steps.items()))
    console.print(f"error by step, of layers at keep {SHOWN:.0%}: {words}")
    if found.linear:
        rows = sorted(found.linear.items(), key=lambda row: row[1])
        words = ", ".join(f"{layer}: {error**0.5:.2f}" for layer, error in rows)
        console.print(f"error of linear attention at its best projection, by layer: {words}")


def _gains(what: str, found: Profile) -> Table:
    """What each of those tried errs, and the best of each head."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim", title="error of a layer")
    for column in (what, "keep", "one keep", "a keep for each head"):
        table.add_column(column, justify="left" if column == what else "right")
    for name in [*found.heads, *["per-head"] * (len(found.heads) > 1)]:
        for keep in (0.06, 0.12, 0.25):
            same, own = found.gain(keep, name)
            table.add_row(name, f"{keep:.0%}", f"{same:.3f}", f"{own:.3f}")
    return table


def _map(
    title: str,
    errors: dict[tuple[int, int], float],
    chosen: dict[tuple[int, int], float],
    overlap: dict[str, float],
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 0), header_style="dim", title=title)
    layers, heads = (sorted({place[i] for place in errors}) for i in (0, 1))
    for column in ("layer ", *(f" head {head} " for head in heads), " same blocks 4 steps on"):
        table.add_column(column, justify="right")
    top = max(errors.values()) or 1.0
    for layer in layers:
        cells = []
        for head in heads:
            share = errors[layer, head] / top
            colour = _COLOURS[min(len(_COLOURS) - 1, int(share * len(_COLOURS)))]
            words = f" {errors[layer, head]:.2f} {chosen[layer, head]:>4.0%} "
            cells.append(Text(words, style=f"white on {colour}"))
        same = overlap.get(str(layer))
        table.add_row(f"{layer} ", *cells, "" if same is None else f"{same:.0%}")
    return table
