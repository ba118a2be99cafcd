"""`dit-accel bench`, and `python -m dit_accel.bench`. Nothing heavy is imported until it runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import typer

from dit_accel.cli.axes import AxisOptions
from dit_accel.cli.options import checked, option
from dit_accel.generation import options as say
from dit_accel.generation.options import WHERE
from dit_accel.media.files import check_place

_BOTH, _OPS, _E2E = "Both", "Operators", "Whole models, with --e2e"
FAILED = 1
Names = list[str] | None

Device = Annotated[Literal["cpu", "cuda"] | None, option("cpu, cuda. \\[a GPU if any]", WHERE)]
Rounds = Annotated[int | None, option("Times that each is timed. \\[5; 3 with --e2e]", _BOTH)]
Out = Annotated[
    Path | None, option("A JSON file to write; --e2e goes on with what it holds.", _BOTH)
]
E2e = Annotated[bool, option("Time whole models, not operators.", _E2E, "--e2e")]


@dataclass(frozen=True)
class OperatorOptions:
    """Which operators are timed, on what."""

    op: Annotated[
        Names,
        option(
            "block_sparse_attention, pooled_attention, rectified_attention. \\[all]", _OPS, "--op"
        ),
    ] = None
    shape: Annotated[
        Names,
        option(
            "wan1.3b-480p, wan14b-720p, hunyuan-720p-129f, cogvideox-5b, ltx-512p-121f, "
            "flux-1024, flux-2048, cpu-4k, cpu-8k, cpu-16k. \\[some that suit the device]",
            _OPS,
        ),
    ] = None
    keep: Annotated[list[float] | None, option("Share of key blocks kept. \\[0.1]", _OPS)] = None
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        option("\\[float32 on the CPU, else bfloat16]", _OPS),
    ] = None
    block: Annotated[int | None, option("64 or 128. \\[64]", _OPS)] = None
    clock: Annotated[
        Literal["wall", "cpu"] | None,
        option("wall, or cpu: processor time of one thread. \\[wall]", _OPS),
    ] = None
    backward: Annotated[
        bool, option("Forward and backward of block_sparse_attention, too.", _OPS, "--backward")
    ] = False
    crossover: Annotated[bool, option("Only the crossover lengths.", _OPS, "--crossover")] = False
    sweep: Annotated[bool, option("Launches for this GPU, the fastest.", _OPS, "--sweep")] = False


@dataclass(frozen=True)
class ModelOptions:
    """Which whole models are timed, and how they are run."""

    model: Annotated[
        Names,
        option(
            "wan1.3b-480p, wan14b-720p, hunyuan-720p, cogvideox-5b, ltx-512p, wan2.2-5b-720p, "
            "flux-1024, sd3.5-1024, qwen-1328. \\[wan1.3b-480p]",
            _E2E,
        ),
    ] = None
    rows: Annotated[Names, option("As in pooled@0.1+compile. \\[the table's]", _E2E)] = None
    steps: Annotated[int | None, option("Of the run that is computed. \\[50]", _E2E)] = None
    minutes: Annotated[float | None, option("Time for everything. \\[no limit]", _E2E)] = None
    tiny: Annotated[bool, option("Small models, to try the path.", _E2E, "--tiny")] = False
    compiler: Annotated[str | None, option("torch.compile's backend. \\[inductor]", _E2E)] = None
    min_tokens: Annotated[int | None, option(say.MIN_TOKENS, _E2E)] = None
    table: Annotated[Path | None, option("Only print the table of such a file.", _E2E)] = None
    csv: Annotated[bool, option("--table as CSV instead of Markdown.", _E2E, "--csv")] = False


def bench(
    *,
    rounds: Rounds = None,
    out: Out = None,
    device: Device = None,
    operators: OperatorOptions,
    axes: AxisOptions,
    e2e: E2e = False,
    models: ModelOptions,
) -> None:
    """Time the operators against dense attention, with an error check; whole models with --e2e.

    dit-accel bench --op pooled_attention --shape wan1.3b-480p --keep 0.05 --out rows.json

    dit-accel bench --pattern topk,top-p --length 8k,32k,256k --ranks 1,4

    dit-accel bench --e2e --model wan1.3b-480p flux-1024 --minutes 4 --out e2e.json

    Exit code 1: a check failed, or no step was timed.
    """
    with checked():
        if rounds is not None and rounds < 1:
            raise ValueError(f"rounds is a number ≥ 1, not {rounds}")
        if out is not None:
            check_place(out)
        by_axes = _given(axes)
        stray = [*by_axes, *_given(operators)] if e2e else _given(models)
        if stray:
            kinds = ("operators", "whole models") if e2e else ("whole models", "operators")
            raise ValueError(
                f"{stray[0]} belongs to {kinds[0]}, not to {kinds[1]}: leave it out, or "
                f"{'leave out' if e2e else 'add'} --e2e"
            )
        if e2e:
            good = _whole_models(models, device, rounds, out)
        elif by_axes:
            good = _axes(operators, axes, device, rounds or 5, out)
        elif operators.sweep:
            good = _sweep(operators, device, rounds, out)
        else:
            good = _operators(operators, device, rounds or 5, out)
    if not good:
        raise typer.Exit(FAILED)


def _given(group: OperatorOptions | AxisOptions | ModelOptions) -> list[str]:
    """The options of a group that were given."""
    names = (f.name for f in fields(group) if getattr(group, f.name) not in ([], f.default))
    return [f"--{name.replace('_', '-')}" for name in names]


def _block(block: int | None) -> int:
    if block not in (None, 64, 128):
        raise ValueError(f"block is 64 or 128, not {block}")
    return 64 if block is None else block


def _operators(asked: OperatorOptions, device: str | None, rounds: int, out: Path | None) -> bool:
    """Whether every error check passed."""
    import torch

    from dit_accel.bench import OPS, crossover, run_bench
    from dit_accel.bench.results import store

    clock, block = asked.clock or "wall", _block(asked.block)
    if clock == "cpu":
        torch.set_num_threads(1)
    if asked.crossover:
        _unused(asked, "--crossover times block-sparse attention at lengths and keeps of its own")
        found = crossover(device, rounds=rounds, clock=clock)
        for row in found:
            ratios = ", ".join(f"{n}: {ratio}" for n, ratio in row["ratios"].items())
            print(f"D={row['head_dim']} keep={row['keep']}: from {row['faster_from']} ({ratios})")
        if out:
            store(found, out)
        return True
    rows = run_bench(
        asked.op or OPS,
        asked.shape,
        asked.keep or (0.1,),
        device,
        out,
        dtype=getattr(torch, asked.dtype) if asked.dtype else None,
        block=block,
        rounds=rounds,
        clock=clock,
        backward=asked.backward,
        echo=print,
    )
    return all(row["check"] == "passed" for row in rows)


def _unused(asked: OperatorOptions, why: str) -> None:
    """ValueError where what is timed was asked for in vain."""
    names = ("op", "shape", "keep", "dtype", "block", "backward")
    given = next((name for name in names if getattr(asked, name)), None)
    if given:
        raise ValueError(f"{why}: leave --{given} out")


def _axes(
    asked: OperatorOptions, axes: AxisOptions, device: str | None, rounds: int, out: Path | None
) -> bool:
    """Whether every error check passed, and every row found room."""
    import torch

    from dit_accel.bench.axes import run_axes
    from dit_accel.bench.axes_table import markdown

    for name in ("backward", "crossover", "sweep"):
        if getattr(asked, name):
            raise ValueError(f"--{name} has no patterns, lengths or ranks: leave it or these out")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if asked.clock == "cpu":
        torch.set_num_threads(1)
    chosen = axes.axes(
        where,
        shapes=asked.shape,
        keeps=asked.keep,
        ops=asked.op,
        dtype=asked.dtype,
        block=_block(asked.block),
        rounds=rounds,
        clock=asked.clock or "wall",
    )
    rows = run_axes(chosen, where, out, echo=print)
    print(f"\n{markdown(rows)}")
    return all(row["check"] == "passed" for row in rows)


def _sweep(
    asked: OperatorOptions, device: str | None, rounds: int | None, out: Path | None
) -> bool:
    from dit_accel.bench import sweep

    fixed = {"op": asked.op, "device": device, "dtype": asked.dtype, "block": asked.block}
    fixed |= {"backward": asked.backward, "clock": asked.clock, "rounds": rounds}
    unused = [name for name, value in fixed.items() if value]
    unused += ["keep"] * (len(asked.keep or ()) > 1)
    if unused:
        raise ValueError(
            "--sweep times the block-sparse forward in bfloat16 on the GPU, with all blocks and at "
            f"one --keep: leave --{unused[0]} out" + " but once" * (unused[0] == "keep")
        )
    sweep.sweep(asked.shape or sweep.TRIED, (asked.keep or [0.05])[0], out, echo=print)
    return True


def _whole_models(
    asked: ModelOptions, device: str | None, rounds: int | None, out: Path | None
) -> bool:
    """Whether any step was timed."""
    from dit_accel.bench import table
    from dit_accel.inputs.data import read_object

    if asked.table:
        record = read_object(asked.table, "record")
        print((table.csv_text if asked.csv else table.markdown)(record))
        return True
    import torch
    from diffusers.utils import logging

    from dit_accel.bench.end_to_end import Benchmark
    from dit_accel.bench.models import find
    from dit_accel.bench.rows import ROWS, Row

    if asked.tiny and asked.min_tokens is not None:
        raise ValueError("--tiny attends sparsely from the first token on: leave --min-tokens out")
    logging.set_verbosity_error()  # it remarks on embeddings that come without a mask
    rows = [Row.parse(name) for name in asked.rows or ROWS]
    models = [find(name) for name in asked.model or ["wan1.3b-480p"]]
    benchmark = Benchmark(
        torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        rounds or 3,
        50 if asked.steps is None else asked.steps,
        minutes=asked.minutes,
        out=out,
        tiny=asked.tiny,
        compiler=asked.compiler or "inductor",
        min_tokens=asked.min_tokens,
    )
    benchmark.run(models, rows)
    print(table.markdown(benchmark.record()))
    return any("seconds" in row for row in benchmark.rows)
