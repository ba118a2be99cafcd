"""The options of `dit-accel batch` and `python -m dit_accel.batch`. Nothing heavy is imported."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli_options import checked, parse_size

NOT_ALL, STOPPED = 1, 3
_JOBS, _RUN, _WHERE = "Defaults of the jobs", "How to work", "Where to run"


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


Texts = list[str] | None
Numbers = list[int] | None


def batch(
    jobs: Annotated[Path, typer.Argument(help="Job file: .jsonl, .csv or .txt (prompts).")],
    output: Annotated[Path, _option("Folder of the clips.", _RUN, "--output", "-o")],
    method: Annotated[Texts, _option("dense, name, name:preset or preset file.", _JOBS)] = None,
    seed: Annotated[Numbers, _option("Seed; several multiply the jobs.", _JOBS)] = None,
    negative: Annotated[str | None, _option("What not to show.", _JOBS)] = None,
    steps: Annotated[Numbers, _option("Denoising steps.", _JOBS)] = None,
    size: Annotated[str | None, _option("WIDTHxHEIGHT in pixels.", _JOBS)] = None,
    frames: Annotated[Numbers, _option("Frames of a clip.", _JOBS)] = None,
    guidance: Annotated[list[float] | None, _option("Guidance scale.", _JOBS)] = None,
    image: Annotated[Path | None, _option("First picture.", _JOBS)] = None,
    retries: Annotated[int, _option("Further tries of a failed job. \\[1]", _RUN)] = 1,
    retry_failed: Annotated[
        bool, _option("Try again what failed in an earlier run.", _RUN, "--retry-failed")
    ] = False,
    keep_going: Annotated[
        bool, _option("Do the good jobs when others are refused.", _RUN, "--keep-going")
    ] = False,
    check_every: Annotated[int, _option("Every n-th job also dense: drift.", _RUN)] = 0,
    at_once: Annotated[int, _option("Clips in one call of the model. \\[1]", _RUN, "--batch")] = 1,
    timeout: Annotated[float, _option("Give a job up after so many seconds.", _RUN)] = 0,
    wait_for_space: Annotated[
        float, _option("Wait so many seconds on a full disk. \\[300]", _RUN)
    ] = 300,
    json_events: Annotated[bool, _option("JSON events on stdout.", _RUN, "--json")] = False,
    workers: Annotated[int, _option("Processes, on each GPU of --gpus. \\[1]", _WHERE)] = 1,
    gpus: Annotated[str | None, _option("all, or numbers such as 0,2.", _WHERE)] = None,
    model: Annotated[str | None, _option("Folder or Hugging Face id.", _WHERE)] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, mps.", _WHERE)] = None,
    dtype: Annotated[str | None, _option("bf16, fp16, fp32.", _WHERE)] = None,
    offload: Annotated[
        bool, _option("Keep only the running part on the GPU.", _WHERE, "--offload")
    ] = False,
) -> None:
    """Make many clips, and go on after any interruption where it stopped.

    dit-accel batch jobs.jsonl -o out/night

    dit-accel batch prompts.txt -o out/seeds --seed 1 --seed 2 --method dense --method topk:fast

    A line of a job file is {"prompt": "a cat", "seed": [1, 2, 3], "method": "topk"}: lists
    multiply. Exit code 0: all done; 1: some failed; 2: refused; 3: stopped, run it again.
    """
    with checked():
        from dit_accel.batch import Settings, run

        width, height = parse_size(size) if size else (None, None)
        defaults = {
            "method": method,
            "seed": seed,
            "negative_prompt": negative,
            "steps": steps,
            "width": width,
            "height": height,
            "frames": frames,
            "guidance": guidance,
            "image": str(image.absolute()) if image else None,
        }
        summary = run(
            jobs,
            output,
            settings=Settings(
                model=model,
                dtype=dtype,
                offload=offload,
                batch=at_once,
                retries=retries,
                keep_going=keep_going,
                timeout=timeout,
                wait_for_space=wait_for_space,
            ),
            defaults={key: value for key, value in defaults.items() if value},
            workers=workers,
            gpus=gpus,
            device=device,
            check_every=check_every,
            retry_failed=retry_failed,
            show="json" if json_events else "auto",
        )
    if json_events:
        print(json.dumps({"event": "summary", **summary.to_dict()}), flush=True)
    elif os.environ.get("RANK", "0") == "0":
        typer.echo(str(summary))
    if not summary.ok:
        raise typer.Exit(STOPPED if summary.stopped or summary.waiting else NOT_ALL)
