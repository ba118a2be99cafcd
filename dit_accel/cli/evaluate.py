"""The options of `dit-accel evaluate`. Nothing heavy is imported until it runs."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from dit_accel.cli.options import Common, checked, numbers, option

_WHAT, _HOW, _WHERE = "What to measure", "How to accelerate", "Where to run"


def evaluate(
    output: Annotated[Path, option("Folder of the results.", _WHAT, "--output", "-o")],
    rows: Annotated[
        str | None,
        option("Comma-separated: steps, prune, methods, presets, preset files. \\[all]", _WHAT),
    ] = None,
    keeps: Annotated[str, option("Shares kept by the methods.", _WHAT)] = "0.05,0.1,0.2,0.3,0.5",
    prompts: Annotated[Path | None, option("Text file, a prompt a line.", _WHAT)] = None,
    seeds: Annotated[str, option("Comma-separated. \\[0]", _WHAT)] = "0",
    limit: Annotated[int | None, option("At most so many new cells now.", _WHAT)] = None,
    minutes: Annotated[float | None, option("Stop in time for so many minutes.", _WHAT)] = None,
    resume: Annotated[
        bool, option("Go on with what --output holds; refuse when that is nothing.", _WHAT)
    ] = False,
    attention: Annotated[
        bool, option("Error of the attention output per layer and step.", _WHAT)
    ] = True,
    batch: Annotated[int, option("Clips in one call of the model. \\[1]", _WHERE)] = 1,
    steps: Annotated[int | None, option("Denoising steps.", _WHAT)] = None,
    size: Annotated[str | None, option("WIDTHxHEIGHT in pixels.", _WHAT)] = None,
    frames: Annotated[int | None, option("Frames of a clip.", _WHAT)] = None,
    guidance: Annotated[float | None, option("Classifier-free guidance scale.", _WHAT)] = None,
    warmup: Annotated[
        str | None, option("Dense steps at the start: a share or a number. \\[0.15]", _HOW)
    ] = None,
    order: Annotated[str | None, option("Token order: raster, tile or hilbert.", _HOW)] = None,
    min_tokens: Annotated[int | None, option("Attend densely below this many.", _HOW)] = None,
    sla_weights: Annotated[
        list[Path] | None,
        option("Learned weights, or a folder that finetune wrote: adds rows. Repeatable.", _HOW),
    ] = None,
    model: Annotated[str | None, option("Folder or Hugging Face id.", _WHERE)] = None,
    device: Annotated[str | None, option("cpu, cuda, cuda:1, mps.", _WHERE)] = None,
    dtype: Annotated[str | None, option("bf16, fp16, fp32.", _WHERE)] = None,
    offload: Annotated[
        bool, option("Keep only the running part on the GPU.", _WHERE, "--offload")
    ] = False,
) -> None:
    """Compare configurations over prompts and seeds: closeness to dense, kept work, time.

    dit-accel evaluate -o out/eval --seeds 0,1

    dit-accel evaluate -o out/quick --rows steps,pooled,fast.json --keeps 0.2 --limit 8

    dit-accel evaluate -o out/night --prompts 64.txt --batch 16 --minutes 8

    Run it again with the same folder to go on; what is measured is not measured again.
    """
    began = time.monotonic()
    from dit_accel.evaluate import rows as table
    from dit_accel.evaluate.run import Budget

    common = Common(
        prompt="-",
        steps=steps,
        size=size,
        frames=frames,
        guidance=guidance,
        warmup=warmup,
        order=order,
        min_tokens=min_tokens,
        model=model,
        device=device,
        dtype=dtype,
        offload=offload,
    )
    names = [name.strip() for name in rows.split(",") if name.strip()] if rows else table.DEFAULT
    with checked():
        if resume and not (output / "cells.jsonl").is_file():
            raise ValueError(f"{output} holds no evaluation to go on with: leave --resume out")
        data = _run(
            common,
            output,
            names,
            numbers(keeps, float, "keeps"),
            prompts,
            numbers(seeds, int, "seeds"),
            [str(path) for path in sla_weights or ()],
            budget=Budget(limit, minutes, began),
            batch=batch,
            attention=attention,
        )
    _print(data, output)


def _run(
    common: Common,
    output: Path,
    names: Sequence[str],
    keeps: list[float],
    prompts: Path | None,
    seeds: list[int],
    sla: list[str],
    *,
    batch: int,
    **options: Any,
) -> dict[str, Any]:
    from dit_accel.cli.progress import Progress
    from dit_accel.cli.session import open_study
    from dit_accel.evaluate.rows import rows
    from dit_accel.evaluate.run import evaluate
    from dit_accel.generation.loading import EMBEDDED
    from dit_accel.inputs.prompts import read_prompts

    texts = read_prompts(prompts or EMBEDDED.parent / "prompts.txt")
    rows(names, keeps, 2, common.config(), sla)  # refused before the model is loaded
    with Progress() as progress:
        study = open_study(common, texts[0], output, progress, batch)
        return evaluate(
            study,
            rows(names, keeps, study.steps, common.config(), sla),
            texts,
            seeds,
            **options,
            command=shlex.join(["dit-accel", *sys.argv[1:]]),
            progress=progress,
            note=lambda line: progress.console.print(
                line, markup=False, highlight=False, soft_wrap=True
            ),
        )


def _print(data: dict[str, Any], output: Path) -> None:
    from rich.console import Console

    from dit_accel.evaluate.tables import markdown

    screen = Console(highlight=False, soft_wrap=True)
    screen.print(markdown(data["rows"], data["dense"], data["notes"]), markup=False)
    if data["missing"]:
        screen.print(f"{data['missing']} cells are left: run the same command again")
    names = sorted(p.name for p in output.iterdir() if p.is_file() and p.suffix != ".jsonl")
    screen.print(f"{output}/  {', '.join(names)}", markup=False)
