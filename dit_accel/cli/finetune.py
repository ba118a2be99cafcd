"""The options of `dit-accel finetune`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from dit_accel.cli.options import parse_size
from dit_accel.finetune.config import OBJECTIVES, PRECISIONS, TRAIN, Settings
from dit_accel.forward.order import ORDERS
from dit_accel.methods.sla import SLA

_METHOD = ("keep", "linear", "combine", "feature_map", "block_q", "block_k", "weights")


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="dit-accel finetune",
        description="Train SLA's projections, and the model's weights or a LoRA with them, so that "
        "sparse attention gives what dense attention gives. See docs/train/finetune.md.",
    )
    add = words.add_argument
    data = words.add_argument_group("data")
    add("-o", "--out", help="folder of the result; may be left out with --prepare")
    add("--model", help="folder or Hugging Face id [the embedded model]")
    data.add_argument("--data", help="prepared folder, or self: the model's own samples [self]")
    data.add_argument("--prepare", metavar="CLIPS", help="encode a captioned folder into --data")
    data.add_argument("--prompts", help="text file, one prompt a line [the package's]")
    data.add_argument("--samples", type=int, help="clips of --data self [64]")
    data.add_argument("--size", help="WIDTHxHEIGHT in pixels [the model's]")
    data.add_argument("--frames", type=int, help="frames of a clip [the model's]")
    method = words.add_argument_group("method")
    method.add_argument("--keep", type=float, help="share of key blocks kept [0.1]")
    method.add_argument("--linear", help="all, rest, marginal or none [all]")
    method.add_argument("--combine", help="project or gate [project]")
    method.add_argument("--feature-map", help="softmax, elu or relu [softmax]")
    method.add_argument("--block-q", type=int, help="64 or 128 [128 from 8,192 tokens on]")
    method.add_argument("--block-k", type=int, help="64 or 128 [64]")
    method.add_argument("--order", choices=ORDERS, help="token order [raster]")
    method.add_argument("--weights", help="SLA weights to start from (.safetensors)")
    _add_training(words)
    return words


def _add_training(words: argparse.ArgumentParser) -> None:
    train = words.add_argument_group("training")
    train.add_argument("--train", choices=TRAIN, help="what is trained [projection]")
    train.add_argument("--objective", choices=OBJECTIVES, help="velocity to match [teacher]")
    train.add_argument("--steps", type=int, help="optimizer steps [2000]")
    train.add_argument("--batch", type=int, help="clips at a time on each device [1]")
    train.add_argument("--accumulate", type=int, help="batches in a step [1]")
    train.add_argument("--lr", type=float, help="rate of weights [1e-5] or LoRA [1e-4]")
    train.add_argument("--lr-projection", type=float, help="rate of SLA's tensors [1e-3]")
    train.add_argument("--lr-warmup", type=int, help="steps of linear warm-up [100]")
    train.add_argument("--lr-decay", type=float, help="share of the steps that fall to rate 0 [0]")
    train.add_argument("--weight-decay", type=float, help="[0.01]")
    train.add_argument("--clip", type=float, help="largest gradient norm [1]")
    train.add_argument("--ema", type=float, help="decay of the averaged weights, 0: off [0.999]")
    train.add_argument("--drop-prompt", type=float, help="share with the negative prompt [0.1]")
    train.add_argument("--rank", type=int, help="of the LoRA [16]")
    train.add_argument("--seed", type=int, help="[0]")
    run = words.add_argument_group("run")
    run.add_argument("--precision", choices=PRECISIONS, help="mixed precision [no]")
    run.add_argument("--checkpointing", action="store_const", const=True, help="save memory")
    run.add_argument("--device", help="cpu [a GPU if any]")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out")
    run.add_argument("--save-every", type=int, help="steps between checkpoints [500]")
    run.add_argument("--validate-every", type=int, help="steps between validations [500]")
    run.add_argument("--log-every", type=int, help="steps between lines of log.jsonl [10]")
    run.add_argument("--clips", type=int, help="validation clips [2]")
    run.add_argument("--validation", help="text file of their prompts [those of --prompts]")
    run.add_argument("--warmup", type=float, help="dense share of their steps [0]")


def settings(options: argparse.Namespace) -> Settings:
    """The run that is asked for; ValueError for what cannot be."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    form: dict[str, Any] = {"keep": 0.1} | {n: given.pop(n) for n in _METHOD if n in given}
    if form.get("linear") == "none":
        form["linear"] = None
    if "size" in given:
        given["size"] = parse_size(given["size"])
    known = {f.name for f in fields(Settings)}
    run = {name: value for name, value in given.items() if name in known}
    return Settings(**{"out": ".", **run, "method": SLA(**form)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare data, train, or both, as the options say. Raises ValueError for bad input."""
    words = parser()
    options = words.parse_args(arguments)
    if options.out is None and options.prepare is None:
        words.error("the following arguments are required: -o/--out")
    asked = settings(options)
    import diffusers
    import transformers
    from rich.console import Console

    from dit_accel.cli.progress import Progress
    from dit_accel.finetune.run import finetune, prepare_data

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    console = Console(highlight=False, soft_wrap=True)
    if options.prepare is not None:
        with Progress() as progress:
            count = prepare_data(asked, options.prepare, progress)
        console.print(f"{count} clips encoded in {asked.data}", markup=False)
        if options.out is None:
            return 0
    with Progress() as progress:
        done = finetune(asked, options.resume, progress)
    before, after = done.velocity_error
    if done.files:
        console.print(
            f"{done.steps} steps: velocity error to the dense model {before:.4f} before, "
            f"{after:.4f} after",
            markup=False,
        )
        for path in done.files:
            console.print(str(path), markup=False)
    return 0
