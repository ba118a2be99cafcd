"""`dit-accel evaluate`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dit_accel.cli.options import PROMPTS, SEEDS, checked, numbers, option, seeds, words
from dit_accel.generation import options as say
from dit_accel.generation.options import WHERE, Clips, Where

if TYPE_CHECKING:
    from dit_accel.config import AccelConfig
    from dit_accel.evaluate import Study
    from dit_accel.evaluate.rows import Row

_WHAT = "What to measure"

Output = Annotated[Path, option("Folder of the results.", _WHAT, "--output", "-o")]


@dataclass(frozen=True)
class TableOptions:
    """What to measure."""

    rows: Annotated[
        str | None,
        option("Comma-separated: steps, prune, methods, presets, preset files. \\[all]", _WHAT),
    ] = None
    keeps: Annotated[str, option("Shares kept by the methods.", _WHAT)] = "0.05,0.1,0.2,0.3,0.5"
    prompts: Annotated[Path | None, option(PROMPTS, _WHAT)] = None
    seeds: Annotated[str, option(SEEDS, _WHAT)] = "0"
    limit: Annotated[int | None, option("At most so many new cells now.", _WHAT)] = None
    minutes: Annotated[float | None, option("Stop in time for so many minutes.", _WHAT)] = None
    resume: Annotated[
        bool, option("Go on with what --output holds; refuse when that is nothing.", _WHAT)
    ] = False
    attention: Annotated[
        bool, option("Error of the attention output per layer and step.", _WHAT)
    ] = True
    batch: Annotated[int, option("Clips in one call of the model. \\[1]", WHERE)] = 1
    sla_weights: Annotated[
        list[Path] | None,
        option("Learned weights, or a folder that finetune wrote: adds rows. Repeatable.", say.HOW),
    ] = None


def evaluate(
    output: Output, table: TableOptions, clips: Clips, where: Where, warmup: say.Warmup = None
) -> None:
    """Compare configurations over prompts and seeds: closeness to dense, kept work, time.

    dit-accel evaluate -o out/eval --seeds 0,1

    dit-accel evaluate -o out/quick --rows steps,pooled,fast.json --keeps 0.2 --limit 8

    dit-accel evaluate -o out/night --prompts 64.txt --batch 16 --minutes 8

    Run it again with the same folder to go on; what is measured is not measured again.
    """
    began = time.monotonic()
    with checked():
        if table.resume and not (output / "cells.jsonl").is_file():
            raise ValueError(f"{output} holds no evaluation to go on with: leave --resume out")
        data = _run(output, table, clips, where, warmup, began)
    _print(data, output)


def _run(
    output: Path, table: TableOptions, clips: Clips, where: Where, warmup: str | None, began: float
) -> dict[str, object]:
    from dit_accel.cli.progress import Progress
    from dit_accel.cli.session import noted, open_study, typed
    from dit_accel.evaluate.rows import DEFAULT, rows
    from dit_accel.evaluate.run import FILES, Budget, evaluate
    from dit_accel.generation.loading import EMBEDDED
    from dit_accel.inputs.prompts import read_prompts

    names = words(table.rows) if table.rows else DEFAULT
    keeps, starts = numbers(table.keeps, float, "keeps"), seeds(table.seeds)
    learned = [str(path) for path in table.sla_weights or ()]
    budget, how = Budget(table.limit, table.minutes, began), clips.how(warmup)
    config = how.config()
    texts = read_prompts(table.prompts or EMBEDDED.parent / "prompts.txt")
    rows(names, keeps, 2, config, learned)  # refused before the model is loaded
    asked = clips.of(texts[0]), how, where, output
    with Progress() as progress, open_study(*asked, progress, FILES, table.batch) as study:
        return evaluate(
            study,
            _rows(study, names, keeps, config, learned, warmup),
            texts,
            starts,
            budget=budget,
            attention=table.attention,
            command=typed(),
            progress=progress,
            note=noted(progress),
        )


def _rows(
    study: Study,
    names: Sequence[str],
    keeps: list[float],
    config: AccelConfig,
    learned: list[str],
    warmup: str | None,
) -> list[Row]:
    """With a checkpoint, first as it was trained; the others under its schedule."""
    from dit_accel.evaluate.rows import Row, rows

    known = study.trained
    if known is None:
        return rows(names, keeps, study.steps, config, learned)
    config = config if warmup is not None else replace(config, schedule=known.schedule)
    found = rows(names, keeps, study.steps, config, learned)
    if known.method.name == "dense":
        return found
    return [Row("checkpoint", "checkpoint", known), *found]


def _print(data: dict[str, Any], output: Path) -> None:
    from dit_accel.cli.screen import screen
    from dit_accel.evaluate.tables import markdown

    out = screen()
    out.print(markdown(data["rows"], data["dense"], data["notes"]))
    if data["missing"]:
        out.print(f"{data['missing']} cells are left: run the same command again")
    names = sorted(p.name for p in output.iterdir() if p.is_file() and p.suffix != ".jsonl")
    out.print(f"{output}/  {', '.join(names)}")
