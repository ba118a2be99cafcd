"""What SLA's branches learn, all trained alike: velocity error to the dense model, and clips.

    python benchmarks/finetune_branches.py --out results.json --steps 40                # on a CPU
    python benchmarks/finetune_branches.py --out results.json --whole --device cuda --budget 560

Each row is trained in a process of its own on the same samples with the same draws. Without --whole
its tensors are trained alone, in float32. With --whole a row is trained as assets/emoji-sla was, in
fewer steps, and makes clips of prompts that it was not trained on, held against dense ones made
once: all processes compile side by side while the samples are made, then each has its turn. Written
row by row; a row that would not be done within --budget seconds gives up after twenty steps. With
the same --folder the rows that it holds are not made again.
"""

from __future__ import annotations

import argparse
import gc
import json
import queue
import random
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch
from gpu_all import Child

from dit_accel import SLA
from dit_accel.config import AccelConfig
from dit_accel.evaluate import Row, Study, evaluate, read_prompts
from dit_accel.evaluate.clips import free
from dit_accel.evaluate.rows import rows as rows_of
from dit_accel.evaluate.scenes import recogniser
from dit_accel.finetune import Settings, finetune
from dit_accel.finetune.checkpoint import checkpoints
from dit_accel.finetune.prepare import finish, own_samples
from dit_accel.generation import Request, load_pipeline
from dit_accel.generation.loading import EMBEDDED
from dit_accel.machine import describe
from dit_accel.media.files import write_text
from dit_accel.methods.budget import linear_layers
from dit_accel.methods.dense import Dense
from dit_accel.schedule import Schedule

HERE = Path(__file__).parent
PROMPTS = EMBEDDED.parent / "prompts-report.txt"
THREE_QUARTERS = linear_layers(f"{HERE / 'results' / 'cpu-profile-linear.json'}@0.75")
ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gate": {"combine": "gate"},
    **{name: {"branch": name} for name in ("decay", "gated", "rala", "rms", "gated & rms")},
    "rala & rms": {"branch": "rala & rms"},
    **{name: {"branch": name} for name in ("conv", "decay & conv", "memory", "latents")},
    "conv alone": {"linear": None, "branch": "conv"},
    "sub": {"select": "sub"},
    "learned": {"select": "learned"},
    "learned alone": {"linear": None, "select": "learned"},
    "linear layers": {"linear_layers": THREE_QUARTERS},
}
# What is asked for first, and what runs in plain torch last.
WHOLE = {
    **{"train": "lora", "size": 512, "frames": 33, "keep": 0.05, "select": "sub", "block_q": 64},
    **{"precision": "bf16", "batch": 8, "steps": 200, "lr_decay": 0.3, "ema": 0.998},
    **{"samples": 160, "scenes": 256, "clips": 32},
    "rows": "plain;rms;conv;gated & rms;linear layers;learned;rala & rms;gate;conv alone;rala;"
    "gated;memory;latents;decay",
}
TEMPLATE = AccelConfig(Dense(), Schedule(warmup=0), min_tokens=0)
_PLACES = ("out", "folder", "rows", "data", "row", "budget", "ready")
TIMES = ("family", "seconds", "wall", "dense_seconds", "speedup", "state_bytes")
LOOK = 10  # steps between the two looks at how long a run will take
MARGIN = 20.0  # seconds in which nothing is begun any more


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("out/branches"), help="of the runs")
    parser.add_argument("--whole", action="store_true", help="the settings of assets/emoji-sla")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--ready", type=float, default=90, help="seconds that compilers may take")
    parser.add_argument("--model", help="folder; without it the embedded model")
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with ; between them")
    parser.add_argument("--data", default="self", help="prepared folder")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=0, help="prompts drawn for the samples")
    parser.add_argument("--train", default="projection")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", default="no")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lr-decay", type=float, default=0.0)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--select", default="means")
    parser.add_argument("--block-q", type=int)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--clips", type=int, default=0, help="prompts of which clips are made")
    parser.add_argument("--denoise", type=int, help="steps of a clip")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # the one of this process
    if parser.parse_known_args()[0].whole:
        parser.set_defaults(**WHOLE)
    return parser.parse_args()


def told(args: argparse.Namespace) -> dict[str, object]:
    """What was asked for, but places and rows."""
    return {name: x for name, x in vars(args).items() if name not in _PLACES}


def home(args: argparse.Namespace, name: str) -> Path:
    """The folder of a row."""
    return args.folder / name.replace(" & ", "-").replace(" ", "-")


def method(args: argparse.Namespace, name: str) -> SLA:
    common = {"keep": args.keep, "select": args.select, "block_q": args.block_q}
    return SLA(**common | ROWS[name])


def settings(args: argparse.Namespace, name: str) -> Settings:
    """A row's training."""
    return Settings(
        out=str(home(args, name)), model=args.model, data=data_of(args), clips=0,
        device="cpu" if args.device == "cpu" else None, method=method(args, name),
        size=(args.size, args.size), frames=args.frames, batch=args.batch, steps=args.steps,
        train=args.train, precision=args.precision, lr_projection=args.lr,
        lr_warmup=max(5, args.steps // 15), lr_decay=args.lr_decay,
        ema=args.ema, save_every=args.steps, validate_every=args.steps,
        **({} if args.train == "projection" else {"lr": args.lr}),
        **({"rank": args.rank} if args.train == "lora" else {}),
    )  # fmt: skip


def data_of(args: argparse.Namespace) -> str:
    return str(args.folder / "data") if args.data == "self" else args.data


def prompts_of(args: argparse.Namespace) -> list[str]:
    """Those of the samples: the package's, or so many scenes that no prompt file holds."""
    if not args.scenes:
        return read_prompts(EMBEDDED.parent / "prompts.txt")
    sys.path.append(str(HERE.parent / "assets" / "training"))
    from scene_set import draw

    known = {text for path in EMBEDDED.parent.glob("prompts*.txt") for text in read_prompts(path)}
    rng, found = random.Random(0), dict[str, None]()
    while len(found) < args.scenes:
        text = draw(rng, args.size).text(articles=True)
        found |= {text: None} if text not in known else {}
    return list(found)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    return load_pipeline(args.model, args.device, "fp32" if args.precision == "no" else "bf16")


def study_of(args: argparse.Namespace, pipe: Any, defaults: Any) -> Study:
    """The one folder of clips; dense ones that it holds are not made again."""
    base = Request(
        read_prompts(PROMPTS)[0],
        steps=args.denoise, width=args.size, height=args.size, frames=args.frames,
    )  # fmt: skip
    judge = recogniser(args.model)
    return Study(pipe, defaults, base, args.folder / "clips", batch=args.batch, recogniser=judge)


def clips(study: Study, row: Row, args: argparse.Namespace) -> tuple[dict, dict]:
    """What a row's clips show, and what the dense ones do. No times: others may be compiling."""
    prompts = read_prompts(PROMPTS)[: args.clips]
    data: dict[str, Any] = evaluate(study, [row], prompts, [0], command=shlex.join(sys.argv))
    each = {"psnr_each": [cell.get("psnr") for cell in data["cells"]]}
    found = [
        {key: x for key, x in y.items() if key not in TIMES}
        for y in (data["rows"][0], data["dense"])
    ]
    return found[0] | each, found[1]


class TooLate(Exception):
    """A row would not be done in time."""


def in_time(end: float) -> Callable[[str, int, int | None], None]:
    """For finetune's progress: gives up when the steps that are left take longer than until `end`
    (time.monotonic)."""
    seen: list[float] = []

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase != "training" or done not in (LOOK, 2 * LOOK):
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seen.append(time.monotonic())
        if len(seen) == 2:
            each = (seen[1] - seen[0]) / LOOK
            if seen[1] + each * ((total or 0) - done) > end:
                raise TooLate(f"not done in time, {each:.2f} s a step")

    return progress


def measure(args: argparse.Namespace, name: str, end: float, write: Callable[..., None]) -> None:
    """Train a row and make its clips."""
    asked = settings(args, name)
    out = Path(asked.out)
    if cuda := args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    done = finetune(asked, resume=bool(checkpoints(out)), progress=in_time(end))
    before, after = done.velocity_error
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    each = median(line["seconds"] for line in lines if "seconds" in line)
    write(before=before, after=after, seconds_a_step=each)
    if cuda:
        write(peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2))
    if args.clips:
        (row,) = rows_of([], [args.keep], args.denoise or 1, TEMPLATE, [str(out)])
        write(clips=clips(study_of(args, *load(args)), row, args)[0])


def compile_ahead(args: argparse.Namespace, name: str) -> None:
    """Two steps of a row, thrown away: its kernels are compiled then."""
    with tempfile.TemporaryDirectory() as folder:
        small = replace(settings(args, name), out=f"{folder}/run", data="self")
        finetune(replace(small, samples=2, batch=2, steps=2, save_every=2, validate_every=2))
    gc.collect()
    free()


def one_row(args: argparse.Namespace, name: str) -> None:
    """The process of a row: it is told when its turn is, and how many seconds it has."""
    facts: dict[str, object] = {"asked": told(args)}

    def write(**more: object) -> None:
        facts.update(more)
        write_text(home(args, name) / "row.json", json.dumps(facts, indent=1))

    if args.whole:
        try:
            compile_ahead(args, name)
        except Exception:  # its turn will tell
            traceback.print_exc()
    print("ready", flush=True)
    end = time.monotonic() + float(sys.stdin.readline())
    try:
        home(args, name).mkdir(parents=True, exist_ok=True)
        measure(args, name, end, write)
        write(done=True)
    except Exception as error:
        traceback.print_exc()
        write(error=str(error)[:400] or type(error).__name__)
    print("done", flush=True)


class Books:
    """What is known of each row, written whenever there is more."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.found = args, dict[str, Any]()

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.found[name] = {key: x for key, x in row.items() if key not in ("asked", "done")}
        facts = {"machine": describe(self.args.device), "asked": told(self.args)}
        record = {"command": shlex.join(sys.argv), **facts, "rows": self.found}
        self.args.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        print(f"{name}: {json.dumps(self.found[name])[:240]}", flush=True)

    def read(self, name: str) -> dict[str, Any]:
        """What a row's process has written; nothing where other settings were asked for."""
        path = home(self.args, name) / "row.json"
        row = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return row if row.get("asked") == json.loads(json.dumps(told(self.args))) else {}


def begin(args: argparse.Namespace, books: Books) -> float:
    """Make the samples, the dense clips and those of what is not trained here; the seconds that one
    row's clips take."""
    pipe, defaults = load(args)
    if args.data == "self":
        size = {"height": args.size, "width": args.size, "num_frames": args.frames}
        sized, texts = replace(defaults, **size), prompts_of(args)
        texts = [texts[i % len(texts)] for i in range(args.samples)]
        folder = Path(data_of(args))
        own_samples(
            pipe, sized, texts, args.samples, 0, folder, lambda *state: None, batch=args.batch
        )
        finish(pipe, sized, texts, folder)
    if not args.clips:
        return 0.0
    study, since = study_of(args, pipe, defaults), time.monotonic()
    untrained = Row("untrained", "sla", replace(TEMPLATE, method=method(args, "plain")))
    found, dense = clips(study, untrained, args)
    books.add("dense", {"clips": dense})
    books.add("untrained", {"clips": found})
    took = (time.monotonic() - since) / 2
    if args.model is None and args.whole:
        (shipped,) = rows_of([], [args.keep], 1, TEMPLATE, [str(EMBEDDED.parent / "emoji-sla")])
        books.add("shipped", {"clips": clips(study, shipped, args)[0]})
    return took


def said(child: Child, word: str, end: float, noise: TextIO) -> bool:
    """Whether a process says the word before `end` (time.monotonic), and before it ends."""
    while True:
        try:
            line = child.lines.get(timeout=min(max(0.0, end - time.monotonic()), 0.5))
        except queue.Empty:
            if child.process.poll() is not None or time.monotonic() >= end:
                return False
            continue
        if line.strip() == word:
            return True
        noise.write(line)


def main() -> None:
    args = options()
    if args.row:
        return one_row(args, args.row)
    end, names = time.monotonic() + args.budget, args.rows.split(";")
    if unknown := [name for name in names if name not in ROWS]:
        raise SystemExit(f"no row {unknown[0]!r}: take some of {'; '.join(ROWS)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    books = Books(args)
    left = [name for name in names if not books.read(name).get("done")]
    with (args.folder / "log.txt").open("a") as noise:
        command = [sys.executable, __file__, *sys.argv[1:], "--row"]
        children = {name: Child([*command, name], noise) for name in left if args.whole}
        try:
            reserve = begin(args, books)
            gc.collect()
            free()
            until = min(end, time.monotonic() + args.ready)
            there = {name for name in children if said(children[name], "ready", until, noise)}
            for name in names:
                since, row = time.monotonic(), books.read(name)
                if name in left and end - since < reserve + MARGIN:
                    row = {"error": "not begun, no time was left"}
                elif name in left:
                    child = children.get(name) or Child([*command, name], noise)
                    children[name] = child
                    late = min(end, since + args.ready)
                    if name in there or said(child, "ready", late, noise):
                        child.say(f"{end - time.monotonic() - reserve}\n")
                        said(child, "done", end, noise)
                    child.process.kill()
                    row = books.read(name) or {"error": "its process ended, or was not done"}
                    row["took"] = round(time.monotonic() - since, 1)
                books.add(name, row)
        finally:
            for child in children.values():
                child.process.kill()


if __name__ == "__main__":
    main()
