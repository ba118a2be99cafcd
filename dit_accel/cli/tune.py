"""`dit-accel tune`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel.cli.options import PROMPTS, SEEDS, checked, numbers, option, seeds, words
from dit_accel.generation.options import Clips, Where, parse_warmup

if TYPE_CHECKING:
    from dit_accel.evaluate.tune import Goal


_WHAT, _HOW = "What to reach", "How to search"
NOT_REACHED = 1
KEEPS = ".1,.2,.3,.5"
BUILT_IN = 3  # prompts of each of the package's lists

Output = Annotated[Path, option("Folder of the preset.", _WHAT, "--output", "-o")]


@dataclass(frozen=True)
class AimOptions:
    """What to reach, and on which prompts."""

    psnr: Annotated[float | None, option("Reach this PSNR to dense, in dB.", _WHAT)] = None
    speedup: Annotated[float | None, option("Reach this speed-up of the loop.", _WHAT)] = None
    prompts: Annotated[Path | None, option(PROMPTS, _WHAT)] = None
    held_out: Annotated[
        Path | None, option("Prompts to check with. \\[the last quarter]", _WHAT)
    ] = None
    seeds: Annotated[str, option(SEEDS, _WHAT)] = "0"


@dataclass(frozen=True)
class SearchOptions:
    """What is tried."""

    methods: Annotated[
        str | None, option("Methods. \\[pooled,topk; of few steps shared, too]", _HOW)
    ] = None
    warmups: Annotated[
        str | None,
        option("Shares or numbers of dense steps. \\[.15,.3,.45; of few steps 1,2,0]", _HOW),
    ] = None
    keeps: Annotated[str | None, option("Keeps a layer can get. \\[.1,.2,.3,.5]", _HOW)] = None
    trials: Annotated[int, option("Configurations to try at most. \\[24]", _HOW)] = 24
    profile: Annotated[
        Path | None, option("What `dit-accel profile` wrote, in place of a first dense run.", _HOW)
    ] = None

    def values(self) -> dict[str, Any]:
        """Arguments of evaluate.tune; ValueError for what are no numbers."""
        own = self.profile is not None and self.keeps is None  # then the profile's
        warmups = self.warmups and numbers(self.warmups, parse_warmup, "warmups")
        return {
            "methods": None if self.methods is None else words(self.methods),
            "warmups": warmups or None,
            "keeps": None if own else numbers(self.keeps or KEEPS, float, "keeps"),
            "trials": self.trials,
            "profile": self.profile,
        }


def tune(
    output: Output, aim: AimOptions, search: SearchOptions, clips: Clips, where: Where
) -> None:
    """Find the fastest configuration that is close enough, on your own prompts.

    dit-accel tune -o out/tuned --psnr 35 --prompts my-prompts.txt

    dit-accel generate "a cat" --method out/tuned/preset.json

    dit-accel profile "a cat" --sorts none,tile,time -o profile.json

    dit-accel tune -o out/tuned --psnr 35 --profile profile.json

    Run it again with the same folder to go on. Exit code 1: no trial reached the goal.
    """
    from dit_accel.evaluate.tune import Goal

    with checked():
        goal = Goal(aim.psnr, aim.speedup)
        data = _run(output, goal, aim, search, clips, where)
    _print(data, goal, output)


def _run(
    output: Path, goal: Goal, aim: AimOptions, search: SearchOptions, clips: Clips, where: Where
) -> dict[str, Any]:
    from dit_accel.cli.progress import Progress
    from dit_accel.cli.session import noted, open_study, typed
    from dit_accel.evaluate.tune import FILES, check_search, tune

    known, unseen = _prompts(aim.prompts, aim.held_out)
    starts, tried, how = seeds(aim.seeds), search.values(), clips.how()
    config = how.config()
    check_search(known, unseen, **tried)  # refused before the model is loaded
    asked = clips.of(known[0]), how, where, output
    with Progress() as progress, open_study(*asked, progress, FILES) as study:
        return tune(
            study,
            goal,
            known,
            unseen,
            config,
            seeds=starts,
            **tried,
            command=typed(),
            progress=progress,
            note=noted(progress),
        )


def _prompts(prompts: Path | None, held_out: Path | None) -> tuple[list[str], list[str]]:
    """Those to tune on and those to check with."""
    from dit_accel.generation.loading import EMBEDDED
    from dit_accel.inputs.prompts import read_prompts

    texts = read_prompts(prompts or EMBEDDED.parent / "prompts-tuning.txt")
    if held_out is not None:
        return texts, read_prompts(held_out)
    if prompts is None:
        return texts[:BUILT_IN], read_prompts(EMBEDDED.parent / "prompts.txt")[:BUILT_IN]
    if len(texts) < 2:
        raise ValueError(f"{prompts} holds one prompt: add others, or give --held-out")
    count = max(1, len(texts) // 4)
    return texts[:-count], texts[-count:]


def _print(data: dict[str, Any], goal: Goal, output: Path) -> None:
    from rich.table import Table

    from dit_accel.cli.screen import screen

    out = screen()
    table = Table(box=None, pad_edge=False, header_style="dim", title="frontier")
    for column in ("configuration", "PSNR (dB)", "work kept", "speed-up"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for trial in data["frontier"]:
        figures = f"{trial['psnr']:.1f}", f"{trial['work']:.0%}", f"{trial['speedup']:.2f}×"
        table.add_row(trial["name"], *figures)
    out.print(table, soft_wrap=False)
    chosen, seen = data["chosen"], data["on_held_out"]
    if chosen is None:
        best = max(data["trials"], key=lambda t: t["psnr" if goal.psnr else "speedup"])
        reached = f"{best['psnr']:.1f} dB at {best['speedup']:.2f}×"
        out.print(f"none of {len(data['trials'])} trials reached {goal}: the nearest {reached}")
        raise typer.Exit(NOT_REACHED)
    out.print(
        f"\n{chosen['name']}: {chosen['psnr']:.1f} dB, {chosen['speedup']:.2f}×; on "
        f"{len(data['held_out'])} prompts it did not see {seen['psnr']:.1f} dB "
        f"(worst {seen['worst']:.1f}), {seen['speedup']:.2f}×"
    )
    out.print(f"dit-accel generate PROMPT --method {output / 'preset.json'}")
