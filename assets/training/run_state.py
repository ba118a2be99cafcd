"""What lets a training run be cut off at any minute: budget, moving average, checkpoint, log."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHARD_BYTES = 15 * 2**20
EVERY_SECONDS = 60.0


@dataclass
class Progress:
    """Steps and seconds trained in all runs so far."""

    step: int = 0
    seconds: float = 0.0


def restart(progress: Progress) -> None:
    """Seed by the step, so that a resumed run draws other batches than the run before."""
    random.seed(progress.step)
    torch.manual_seed(progress.step)


class Clock:
    """The time of this run and the share of the whole training that is done."""

    def __init__(self, progress: Progress, minutes: float, total_minutes: float) -> None:
        if minutes <= 0 or total_minutes <= 0:
            raise ValueError(f"Expected positive minutes, got {minutes} of {total_minutes}.")
        self.progress, self.budget, self.total = progress, minutes * 60, total_minutes * 60
        self.before, self.first_step = progress.seconds, progress.step
        self.start = time.monotonic()

    def share(self) -> float:
        """0 at the first step of the first run, 1 when the planned time is used up."""
        return min(1.0, self.progress.seconds / self.total)

    def running(self, max_steps: int | None = None) -> bool:
        """Take the time; False when this run, the whole training or its step limit is over."""
        elapsed = time.monotonic() - self.start
        self.progress.seconds = self.before + elapsed
        done = self.progress.step - self.first_step
        within = max_steps is None or done < max_steps
        return within and elapsed < self.budget and self.share() < 1


def learning_rate(share: float, steps_this_run: int, warmup: int, flat: float) -> float:
    """Factor in (0, 1]: a linear warm-up of every run, flat, then a linear fall to 1 %."""
    rise = min(1.0, (steps_this_run + 1) / warmup)
    fall = 1.0 if share < flat else 1.0 - 0.99 * (share - flat) / max(1e-9, 1 - flat)
    return rise * max(0.01, fall)


class Average:
    """Exponential moving average of the parameters, in float32."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.live = {
            f"{part}.{name}": p for part, m in modules.items() for name, p in m.named_parameters()
        }
        self.values = {name: p.detach().float().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow faster at first: the decay grows from 0 to its value."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.values.values()), [p.detach().float() for p in self.live.values()], 1 - decay
        )

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Start the parameters and the average at saved values."""
        for name, p in self.live.items():
            p.copy_(tensors[name])
            self.values[name].copy_(tensors[name])


def _shards(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard, size = {}, 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def save(folder: Path, average: dict[str, Tensor], progress: Progress, extra: dict) -> None:
    """Write bfloat16 shards of at most 15 MiB and state.json; the folder is replaced when whole."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    half = {name: t.to(torch.bfloat16).cpu().contiguous() for name, t in average.items()}
    for number, shard in enumerate(_shards(half)):
        save_file(shard, new / f"weights-{number:02d}.safetensors")
    (new / "state.json").write_text(json.dumps({**asdict(progress), **extra}, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(new, folder)


def load(folder: Path) -> tuple[dict[str, Tensor], Progress, dict]:
    """Tensors, progress and the extra fields of a checkpoint; ValueError if there is none."""
    state_file = folder / "state.json"
    if not state_file.exists():
        raise ValueError(f"Expected a checkpoint in {folder}, found none; train that stage first.")
    state = json.loads(state_file.read_text())
    tensors = {}
    for shard in sorted(folder.glob("weights-*.safetensors")):
        tensors.update(load_file(shard))
    progress = Progress(state.pop("step"), state.pop("seconds"))
    return tensors, progress, state


class Log:
    """One JSON line every `every` steps in a file and on the screen; refuses a loss that is NaN."""

    def __init__(self, file: Path, every: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.every, self.sums, self.count = file, every, 0.0, 0

    def add(self, progress: Progress, loss: Tensor, **fields: object) -> None:
        """Sum the loss on its device; look at it (a synchronisation) only when a line is due."""
        self.sums, self.count = self.sums + loss.detach(), self.count + 1
        if progress.step % self.every:
            return
        mean = float(self.sums) / self.count
        if not math.isfinite(mean):
            raise RuntimeError(f"Expected a finite loss, got {mean}; lower the learning rate.")
        line = {**asdict(progress), "loss": mean, **fields}
        self.sums, self.count = 0.0, 0
        with self.file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
