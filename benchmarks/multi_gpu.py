"""Everything that takes more than one GPU, for any number of them.

    python benchmarks/multi_gpu.py --gpus 2 --minutes 9 --out results.json
    python benchmarks/multi_gpu.py --gpus 2 --dry-run --out /tmp/x.json     gloo, tiny, on the CPU

batch: a queue of jobs of the embedded model, and of Wan 1.3B with random weights, on one GPU and on
all: efficiency t₁ / (N · t_N); then with one worker killed: every job done once.
ulysses: Wan 1.3B at 480p and 14B at 720p, random weights, dense and by each sparse method: seconds
of a step on one GPU and on all, share of it in communication, distance of the outputs; in float32,
where rounding hides least, with few layers and frames.
ways: Wan 14B and HunyuanVideo at 720p by Ulysses and with queries that stay, their keys gathered or
going round: dense and by each method, with budgets for each head, compiled and not.
joint: a Flux of few layers, its text dividing by the GPUs and not: distance of the outputs.

Rows are written to --out as they end, and rows that it holds are not run again; nor is what one GPU
gives of a row, which a folder beside --out holds. No row begins after --minutes. A process that
fails costs its row; the others are started anew for the rows after it.
NCCL's variables are passed on as they are. Beside this package it imports torch, diffusers,
transformers, accelerate, tokenizers, ftfy and, for "batch", typer, rich, imageio[pyav].
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import multi_gpu_batch as batch
import torch
from multi_gpu_cases import cases
from multi_gpu_ranks import MARGIN
from multi_gpu_run import MARK

from dit_accel.machine import describe

PARTS = ("batch", "ulysses", "joint", "ways")
KEPT = ("NCCL_NVLS_ENABLE", "TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS")


@dataclass
class Record:
    """The rows so far, in a file that is written after each."""

    path: Path
    setting: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=describe)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        found = json.loads(self.path.read_text())
        if (found["setting"], found["machine"].get("gpu")) != (
            self.setting,
            self.machine.get("gpu"),
        ):
            raise ValueError(f"{self.path} holds rows of another setting: give another --out")
        self.rows = [row for row in found["rows"] if complete(row)]

    def add(self, row: dict[str, Any]) -> None:
        """Keep the row in place of an earlier state of it, write all, say it."""
        self.rows = [r for r in self.rows if key(r) != key(row)] + [row]
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        head = {"machine": self.machine, "command": command, "environment": environment}
        text = json.dumps({**head, "setting": self.setting, "rows": self.rows}, indent=1)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(text + "\n")
        part.replace(self.path)
        if complete(row):
            print(line(row), flush=True)

    def missing(self, part: str, names: list[tuple[str, str]]) -> list[tuple[str, str]]:
        have = {key(row) for row in self.rows}
        return [(case, row) for case, row in names if (part, case, row) not in have]


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["part"], row["case"], row["row"]


def complete(row: dict[str, Any]) -> bool:
    """Whether it was measured, or cannot be; what failed or was left out is run again."""
    return any(name in row for name in ("together", "refused", "exactly_once"))


def line(row: dict[str, Any]) -> str:
    """A row as one line of text."""
    text = f"{row['part']:<8} {row['case']:<42} {row['row']:<18} "
    if "refused" in row:
        return text + row["refused"]
    if "exactly_once" in row:
        return text + f"killed {row['killed']}, every job done once: {row['exactly_once']}"
    if "efficiency" in row:
        return text + f"efficiency {row['efficiency']}, steady {row['efficiency_steady']}"
    steps = ", ".join(f"{k} {s} s" for k, s in row["together"]["seconds"].items())
    faster = ", ".join(f"{k} {s}×" for k, s in row.get("speedup", {}).items())
    text += f"{steps} ({faster}), communicating {row['together']['communicating']}"
    if "error" in row:
        text += f", error {row['error']:.1e} ≤ {row['bound']:.1e}: {row['equal']}"
    return text


def launch(gpus: int, spec: dict[str, Any]) -> Iterator[dict[str, Any] | str]:
    """The rows that `gpus` processes say; at last why they failed, if they did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={gpus}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command += [str(Path(__file__).with_name("multi_gpu_ranks.py")), json.dumps(spec)]
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
    with (
        errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
        ) as process,
    ):
        for text in process.stdout:
            if text.startswith(MARK):
                yield json.loads(text.removeprefix(MARK))
            else:
                print(text, end="", flush=True)
        if process.wait():
            errors.seek(0)
            said = errors.read()
            print(said, file=sys.stderr)
            yield _why(said)


def _why(said: str) -> str:
    """The first error that the processes print, or what torchrun says of the first to end."""
    first, _, cause = said.partition("Root Cause")
    own = [line for line in first.splitlines() if "Error:" in line and "ChildFailed" not in line]
    ended = [line.strip() for line in cause.splitlines() if "exitcode" in line or "rank" in line]
    return (own or [", ".join(ended) or "the processes ended without a word"])[0][:300]


def shared(
    record: Record,
    part: str,
    until: float,
    begins: tuple[str, ...] = ("",),
    only: Sequence[str] = (),
) -> None:
    """Part "ulysses", "joint" or "ways", started anew after the row at which a process failed.

    begins: what the names of the cases begin with. only: these rows, unless that is empty.
    """
    setting = record.setting
    wanted = [case for case in cases(part, setting["dry"]) if case.name.startswith(begins)]
    names = [(case.name, row) for case in wanted for row in case.rows if not only or row in only]
    beside = record.path.resolve().with_suffix(".alone")  # what one GPU gives, for the next time
    spec = {"part": part, "until": until, "references": str(beside)}
    spec |= {n: setting[n] for n in ("rounds", "dry")}
    todo = record.missing(part, names)
    while todo:
        begun: dict[tuple[str, str], dict[str, Any]] = {}
        failed = None
        for row in launch(setting["gpus"], {**spec, "todo": todo}):
            if isinstance(row, str):
                failed = row
                break
            row = {"part": part, **row}
            begun[row["case"], row["row"]] = row
            record.add(row)
        over = {name for name, row in begun.items() if complete(row) or "skipped" in row}
        left = [name for name in todo if name not in over]
        if failed is None or not left:
            return
        for case, row in left if not begun else left[:1]:  # none begun: none would
            at_hand = begun.get((case, row), {"part": part, "case": case, "row": row})
            record.add({**at_hand, "failed": failed})
        todo = left[1:] if begun else []


def batches(
    record: Record, jobs: dict[str, int], until: float, begins: tuple[str, ...] = ("",)
) -> None:
    """Part "batch", so many jobs of each model; one whose queue fails costs its own rows."""
    gpus, dry = record.setting["gpus"], record.setting["dry"]
    wanted = {name: queue for name, queue in batch.QUEUES.items() if name.startswith(begins)}
    for name, (build, kinds) in wanted.items():
        todo = [row for _, row in record.missing("batch", [(name, kind) for kind in kinds])]
        work = Path(tempfile.mkdtemp(prefix="multi-gpu-"))
        try:
            if todo and time.time() < until:
                for row in batch.rows(build(work, jobs[name], dry), gpus, todo):
                    record.add({"part": "batch", **row})
            why = {"skipped": "no time left"}
        except Exception as error:
            traceback.print_exc()
            why = {"failed": f"{type(error).__name__}: {error}"[:300]}
        finally:
            shutil.rmtree(work, ignore_errors=True)
        for _, row in record.missing("batch", [(name, kind) for kind in todo]):
            record.add({"part": "batch", "case": name, "row": row, **why})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS[:3]), help="some of %(default)s")
    parser.add_argument("--cases", default="", help="only those whose names begin so, by commas")
    parser.add_argument("--rows", default="", help="only these rows of a case, by commas")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no row later")
    parser.add_argument("--rounds", type=int, default=2, help="timed steps of each kind")
    parser.add_argument("--jobs", type=int, default=40, help="of the embedded model")
    parser.add_argument("--clips", type=int, default=8, help="of Wan 1.3B")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="gloo and tiny sizes on the CPU")
    given = parser.parse_args()
    parts = given.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts takes {', '.join(PARTS)}, not {given.parts}")
    if given.gpus < 2:
        parser.error(f"--gpus is 2 or more, not {given.gpus}")
    if not given.dry_run and torch.cuda.device_count() < given.gpus:
        parser.error(f"this machine has {torch.cuda.device_count()} GPUs, not {given.gpus}")
    until = time.time() + 60 * given.minutes
    setting = {"gpus": given.gpus, "rounds": given.rounds, "dry": given.dry_run, "margin": MARGIN}
    record = Record(given.out, setting)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    begins, jobs = tuple(given.cases.split(",")), {batch.EMOJI: given.jobs, batch.WAN: given.clips}
    for part in parts:
        if part == "batch":
            batches(record, jobs, until, begins)
        else:
            only = given.rows.split(",") if given.rows else ()
            shared(record, part, until, begins, only)
    bad = [key(row) for row in record.rows if not sound(row)]
    print(f"{len(record.rows)} rows; failed, left out or not equal: {bad}")
    return 1 if bad else 0


def sound(row: dict[str, Any]) -> bool:
    """Whether a row holds what it should: outputs equal, nothing dense unplanned, every job done
    once."""
    runs = [row, *(row[name] for name in ("alone", "together") if name in row)]
    once = all(run.get("exactly_once", True) for run in runs) and row.get("killed", 1) == 1
    sparse = not any(run.get("unplanned") for run in runs)
    return sparse and complete(row) and "alone_error" not in row and row.get("equal", True) and once


if __name__ == "__main__":
    sys.exit(main())
