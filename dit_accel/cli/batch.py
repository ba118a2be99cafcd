"""The options of `dit-accel batch` and `python -m dit_accel.batch`. Nothing heavy is imported."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dit_accel.cli.options import Metadata, checked, option
from dit_accel.generation import options as say
from dit_accel.generation.options import WHERE, Kv, Ulysses, Where, parse_size
from dit_accel.parallel import launcher

if TYPE_CHECKING:
    from dit_accel.batch import Settings

NOT_ALL, STOPPED = 1, 3
_JOBS, _RUN = "Defaults of the jobs", "How to work"

Jobs = Annotated[Path, typer.Argument(help="Job file: .jsonl, .csv or .txt (prompts).")]
Output = Annotated[Path, option("Folder of the clips.", _RUN, "--output", "-o")]
Texts = list[str] | None
Numbers = list[int] | None


@dataclass(frozen=True)
class JobOptions:
    """What the jobs are that do not say otherwise; several values multiply them."""

    method: Annotated[Texts, option(say.METHOD, _JOBS)] = None
    prune: Annotated[Texts, option(say.PRUNE, _JOBS)] = None
    step_cache: Annotated[list[float] | None, option(say.STEP_CACHE, _JOBS)] = None
    speed: Annotated[Texts, option(say.SPEED, _JOBS)] = None
    lora: Annotated[Path | None, option(say.LORA, _JOBS)] = None
    quantize: Annotated[Texts, option(say.QUANTIZE, _JOBS)] = None
    seed: Annotated[Numbers, option("Seed; several multiply the jobs.", _JOBS)] = None
    negative: Annotated[str | None, option(say.NEGATIVE, _JOBS)] = None
    steps: Annotated[Numbers, option(say.STEPS, _JOBS)] = None
    size: Annotated[str | None, option(say.SIZE, _JOBS)] = None
    frames: Annotated[Numbers, option(say.FRAMES, _JOBS)] = None
    guidance: Annotated[list[float] | None, option(say.GUIDANCE, _JOBS)] = None
    sampler: Annotated[Texts, option(say.SAMPLER, _JOBS)] = None
    image: Annotated[Path | None, option(say.IMAGE, _JOBS)] = None

    def keys(self) -> dict[str, object]:
        """Keys for jobs that do not have them."""
        width, height = parse_size(self.size) if self.size is not None else (None, None)
        values = {
            "method": self.method,
            "prune": self.prune,
            "step_cache": self.step_cache,
            "speed": self.speed,
            "lora": str(self.lora.absolute()) if self.lora else None,
            "quantize": self.quantize,
            "seed": self.seed,
            "negative_prompt": self.negative,
            "steps": self.steps,
            "width": width,
            "height": height,
            "frames": self.frames,
            "guidance": self.guidance,
            "sampler": self.sampler,
            "image": str(self.image.absolute()) if self.image else None,
        }
        return {key: value for key, value in values.items() if value not in (None, [], ())}


@dataclass(frozen=True)
class WorkOptions:
    """How to work through the jobs."""

    retries: Annotated[int, option("Further tries of a failed job. \\[1]", _RUN)] = 1
    retry_failed: Annotated[
        bool, option("Try again what failed in an earlier run.", _RUN, "--retry-failed")
    ] = False
    keep_going: Annotated[
        bool, option("Do the good jobs when others are refused.", _RUN, "--keep-going")
    ] = False
    check_every: Annotated[int, option("Every n-th job also dense: drift.", _RUN)] = 0
    at_once: Annotated[int, option("Clips in one call of the model. \\[1]", _RUN, "--batch")] = 1
    timeout: Annotated[float, option("Give a job up after so many seconds.", _RUN)] = 0
    wait_for_space: Annotated[
        float, option("Wait so many seconds on a full disk. \\[300]", _RUN)
    ] = 300
    json_events: Annotated[bool, option("JSON events on stdout.", _RUN, "--json")] = False
    metadata: Metadata = True
    workers: Annotated[int | None, option("Processes, on each GPU of --gpus. \\[1]", WHERE)] = None
    ray: Annotated[
        str | None, option("Work on a Ray cluster: auto, an address, or local.", WHERE)
    ] = None
    gpus: Annotated[str | None, option("all, or numbers such as 0,2.", WHERE)] = None
    compile: Annotated[
        bool, option("Compile the blocks, once for each size.", WHERE, "--compile")
    ] = False

    def settings(self, where: Where) -> Settings:
        """How workers work."""
        from dit_accel.batch import Settings

        return Settings(
            model=where.model,
            checkpoint=where.checkpoint,
            dtype=where.dtype,
            offload=where.offload,
            compile=self.compile,
            batch=self.at_once,
            retries=self.retries,
            keep_going=self.keep_going,
            timeout=self.timeout,
            wait_for_space=self.wait_for_space,
            metadata=self.metadata,
        )


def batch(
    jobs: Jobs,
    output: Output,
    defaults: JobOptions,
    work: WorkOptions,
    where: Where,
    ulysses: Ulysses = 1,
    kv: Kv = None,
) -> None:
    """Make many clips, and go on after any interruption where it stopped.

    dit-accel batch jobs.jsonl -o out/night

    dit-accel batch prompts.txt -o out/seeds --seed 1 --seed 2 --method dense --method topk:fast

    A line of a job file is {"prompt": "a cat", "seed": [1, 2, 3], "method": "topk"}: lists
    multiply. Exit code 0: all done; 1: some failed; 2: refused; 3: stopped, run it again.
    """
    with checked():
        launcher.check(ulysses, kv)
        from dit_accel.batch import run
        from dit_accel.cli.session import typed

        summary = run(
            jobs,
            output,
            settings=work.settings(where),
            defaults=defaults.keys(),
            workers=work.workers,
            gpus=work.gpus,
            device=where.device,
            check_every=work.check_every,
            retry_failed=work.retry_failed,
            ulysses=ulysses,
            kv=kv,
            ray=work.ray,
            show="json" if work.json_events else "auto",
            command=typed(),
        )
    if not launcher.first(ulysses):
        return  # the first process has the books, and the last word
    if work.json_events:
        print(json.dumps({"event": "summary", **summary.to_dict()}), flush=True)
    elif os.environ.get("RANK", "0") == "0":
        typer.echo(str(summary))
    if not summary.ok:
        raise typer.Exit(STOPPED if summary.stopped or summary.waiting else NOT_ALL)
