"""The options of `dit-accel batch` and `python -m dit_accel.batch`. Nothing heavy is imported."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from dit_accel.cli.options import checked, parse_size
from dit_accel.parallel import launcher as ranks

if TYPE_CHECKING:
    from dit_accel.batch import Settings

NOT_ALL, STOPPED = 1, 3
_JOBS, _RUN, _WHERE = "Defaults of the jobs", "How to work", "Where to run"


def _option(text: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


Texts = list[str] | None
Numbers = list[int] | None


@dataclass(frozen=True)
class Options:
    """One field, one option; None leaves the choice to the job, the model or the method."""

    jobs: Annotated[Path, typer.Argument(help="Job file: .jsonl, .csv or .txt (prompts).")]
    output: Annotated[Path, _option("Folder of the clips.", _RUN, "--output", "-o")]
    method: Annotated[Texts, _option("dense, name, name:preset or preset file.", _JOBS)] = None
    prune: Annotated[
        Texts, _option("Share of the tokens run in most steps, or safe, balanced, fast.", _JOBS)
    ] = None
    seed: Annotated[Numbers, _option("Seed; several multiply the jobs.", _JOBS)] = None
    negative: Annotated[str | None, _option("What not to show.", _JOBS)] = None
    steps: Annotated[Numbers, _option("Denoising steps.", _JOBS)] = None
    size: Annotated[str | None, _option("WIDTHxHEIGHT in pixels.", _JOBS)] = None
    frames: Annotated[Numbers, _option("Frames of a clip.", _JOBS)] = None
    guidance: Annotated[list[float] | None, _option("Guidance scale.", _JOBS)] = None
    image: Annotated[Path | None, _option("First picture.", _JOBS)] = None
    retries: Annotated[int, _option("Further tries of a failed job. \\[1]", _RUN)] = 1
    retry_failed: Annotated[
        bool, _option("Try again what failed in an earlier run.", _RUN, "--retry-failed")
    ] = False
    keep_going: Annotated[
        bool, _option("Do the good jobs when others are refused.", _RUN, "--keep-going")
    ] = False
    check_every: Annotated[int, _option("Every n-th job also dense: drift.", _RUN)] = 0
    at_once: Annotated[int, _option("Clips in one call of the model. \\[1]", _RUN, "--batch")] = 1
    timeout: Annotated[float, _option("Give a job up after so many seconds.", _RUN)] = 0
    wait_for_space: Annotated[
        float, _option("Wait so many seconds on a full disk. \\[300]", _RUN)
    ] = 300
    json_events: Annotated[bool, _option("JSON events on stdout.", _RUN, "--json")] = False
    workers: Annotated[int | None, _option("Processes, on each GPU of --gpus. \\[1]", _WHERE)] = (
        None
    )
    ulysses: Annotated[int, _option("GPUs (or processes) that share each clip. \\[1]", _WHERE)] = 1
    ray: Annotated[
        str | None, _option("Work on a Ray cluster: auto, an address, or local.", _WHERE)
    ] = None
    gpus: Annotated[str | None, _option("all, or numbers such as 0,2.", _WHERE)] = None
    model: Annotated[str | None, _option("Folder or Hugging Face id.", _WHERE)] = None
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, mps.", _WHERE)] = None
    dtype: Annotated[str | None, _option("bf16, fp16, fp32.", _WHERE)] = None
    offload: Annotated[
        bool, _option("Keep only the running part on the GPU.", _WHERE, "--offload")
    ] = False
    compile: Annotated[
        bool, _option("Compile the blocks, once for each size.", _WHERE, "--compile")
    ] = False

    def defaults(self) -> dict[str, Any]:
        """Keys for jobs that do not have them."""
        width, height = parse_size(self.size) if self.size else (None, None)
        values = {
            "method": self.method,
            "prune": self.prune,
            "seed": self.seed,
            "negative_prompt": self.negative,
            "steps": self.steps,
            "width": width,
            "height": height,
            "frames": self.frames,
            "guidance": self.guidance,
            "image": str(self.image.absolute()) if self.image else None,
        }
        return {key: value for key, value in values.items() if value}

    def settings(self) -> Settings:
        """How workers work."""
        from dit_accel.batch import Settings

        mine = {"batch": self.at_once}
        names = (f.name for f in fields(Settings) if f.name not in mine)
        return Settings(**{name: getattr(self, name) for name in names}, **mine)


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(**values)` the signature that Options has."""
    hints = get_type_hints(Options, include_extras=True)
    mine = inspect.signature(Options).parameters.values()
    mine = [p.replace(kind=p.KEYWORD_ONLY, annotation=hints[p.name]) for p in mine]
    command.__signature__ = inspect.Signature(mine)
    command.__annotations__ = {p.name: p.annotation for p in mine}
    return command


@_with_options
def batch(**values: Any) -> None:
    """Make many clips, and go on after any interruption where it stopped.

    dit-accel batch jobs.jsonl -o out/night

    dit-accel batch prompts.txt -o out/seeds --seed 1 --seed 2 --method dense --method topk:fast

    A line of a job file is {"prompt": "a cat", "seed": [1, 2, 3], "method": "topk"}: lists
    multiply. Exit code 0: all done; 1: some failed; 2: refused; 3: stopped, run it again.
    """
    options = Options(**values)
    with checked():
        ranks.check(options.ulysses)
        from dit_accel.batch import run

        summary = run(
            options.jobs,
            options.output,
            settings=options.settings(),
            defaults=options.defaults(),
            workers=options.workers,
            gpus=options.gpus,
            device=options.device,
            check_every=options.check_every,
            retry_failed=options.retry_failed,
            ulysses=options.ulysses,
            ray=options.ray,
            show="json" if options.json_events else "auto",
        )
    if not ranks.first(options.ulysses):
        return  # the first process has the books, and the last word
    if options.json_events:
        print(json.dumps({"event": "summary", **summary.to_dict()}), flush=True)
    elif os.environ.get("RANK", "0") == "0":
        typer.echo(str(summary))
    if not summary.ok:
        raise typer.Exit(STOPPED if summary.stopped or summary.waiting else NOT_ALL)
