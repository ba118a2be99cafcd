"""The training loop: draw, noise, compare velocities, step, average; log, validate, save."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel import api
from dit_accel.finetune.average import Average
from dit_accel.finetune.checkpoint import Training
from dit_accel.finetune.config import Settings
from dit_accel.finetune.data import Batch, LatentData
from dit_accel.finetune.student import Student, Teacher, training_config
from dit_accel.inputs.text import read
from dit_accel.media.files import atomic
from dit_accel.methods.trained import lessons

if TYPE_CHECKING:
    from accelerate import Accelerator


_TRAIN, _VALIDATE = 0, 1


class Log:
    """JSON lines; a resumed run drops those behind its checkpoint."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if line["step"] <= step] if step else []
        with atomic(path) as temporary:
            text = "".join(json.dumps(line) + "\n" for line in kept)
            temporary.write_text(text, encoding="utf-8")

    def __call__(self, **values: object) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(values) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, the rest of one that was cut off left out; ValueError for no log."""
    if not path.is_file():
        return []
    text = read(path, "log")
    try:
        found = [json.loads(line) for line in text[: text.rfind("\n") + 1].split("\n") if line]
        return [line for line in found if line["step"] >= 0]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no log of a fine-tuning run ({error}): move it away") from None


def draw_seed(settings: Settings, *place: int) -> int:
    """The seed of one draw: a function of the run's seed and where in the run it is."""
    state = np.random.SeedSequence((settings.seed, *place)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def learning_rate(step: int, settings: Settings) -> float:
    """Factor of the rates at the step after `step` others: a linear rise to 1, and at the end of
    the run, over the share `lr_decay` of its steps, a linear fall."""
    rise = (step + 1) / max(1, settings.lr_warmup)
    fall = (settings.steps - step) / max(1.0, settings.lr_decay * settings.steps)
    return min(1.0, rise, fall)


def parameter_groups(student: Student, settings: Settings) -> list[dict[str, object]]:
    """AdamW's groups: the transformer's trained parameters, if any, and the SLA tensors."""
    weights = [p for p in student.transformer.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": settings.lr},
        {"params": list(student.learned.values()), "lr": settings.lr_projection},
    ]
    return [group for group in groups if group["params"]]


def trained(student: Student, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name → parameter in the optimizer's order."""
    names = {id(p): name for name, p in student.named_parameters()}
    every = (p for group in optimizer.param_groups for p in group["params"])
    return {names[id(p)]: p for p in every}


@dataclass
class Trainer:
    """One process's part of a run; `training.step` counts finished optimizer steps."""

    settings: Settings
    accelerator: Accelerator
    student: Student
    wrapped: torch.nn.Module  # the student as accelerate wraps it
    teacher: Teacher
    data: LatentData
    optimizer: torch.optim.Optimizer
    training: Training
    average: Average

    def __post_init__(self) -> None:
        self.config = training_config(self.student, self.settings)
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.teaching = self.settings.objective == "teacher"

    def batch(self, *place: int) -> Batch:
        """The draw of a place in the run, on the device."""
        s = self.settings
        batch = self.data.draw(s.batch, draw_seed(s, *place), s.drop_prompt, s.grid)
        return batch.to(self.accelerator.device, self.student.transformer.dtype)

    def validation_batches(self, number: int) -> list[Batch]:
        """The same draws at every validation."""
        return [self.batch(_VALIDATE, i) for i in range(number)]

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; its mean loss and gradient norm, 0-d on the device."""
        s, done = self.settings, self.training.step
        for base, group in zip(self.base, self.optimizer.param_groups, strict=True):
            group["lr"] = base * learning_rate(done, s)
        total = torch.zeros((), device=self.accelerator.device)
        rank = self.accelerator.process_index
        for part in range(s.accumulate):
            batch = self.batch(_TRAIN, done, part, rank)
            last = part == s.accumulate - 1
            unsynced = self.accelerator.no_sync(self.wrapped)
            with contextlib.nullcontext() if last else unsynced:
                total += self._backward(batch) / s.accumulate
        norm = self.accelerator.clip_grad_norm_(list(self.training.live.values()), s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.training.step = done + 1
        self.average.update(self.training.step)
        return total, torch.as_tensor(norm)

    def _backward(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            target = self.teacher.velocity(batch) if self.teaching else batch.velocity
        # the layers stay sparse until the backward pass is over: checkpointing runs them again
        with api.accelerated(self.student, self.config), lessons() as beside:
            noisy = batch.noisy.to(self.student.transformer.dtype)
            found = self.wrapped(noisy, batch.time, batch.conditions)
            loss = F.mse_loss(found.float(), target)
            every = loss + sum(beside)  # those of a selector that learns
            self.accelerator.backward(every / self.settings.accumulate)
        return loss.detach()

    def run(
        self,
        log: Callable[..., None],
        progress: Callable[[str, int, int | None], None],
        on_validate: Callable[[], None],
        on_save: Callable[[], None],
    ) -> None:
        """Train to settings.steps. Raises RuntimeError when the loss is no number any more."""
        s, since, began = self.settings, 0, time.perf_counter()
        sums: Tensor | float = 0.0
        while self.training.step < s.steps:
            loss, norm = self.step()
            sums, since, done = sums + loss, since + 1, self.training.step
            progress("training", done, s.steps)
            saving = done % s.save_every == 0 or done == s.steps
            if saving or done % s.log_every == 0:
                mean = float(self.accelerator.reduce(sums, "mean")) / since
                if not math.isfinite(mean):
                    raise RuntimeError(
                        f"the loss is {mean} at step {done}: lower the learning rate, or train "
                        "with --precision bf16 or no"
                    )
                seconds = (time.perf_counter() - began) / since
                rates = [group["lr"] for group in self.optimizer.param_groups]
                log(step=done, loss=mean, grad_norm=float(norm), lr=rates, seconds=seconds)
                sums, since = 0.0, 0
            if done % s.validate_every == 0 or done == s.steps:
                on_validate()
            if saving:
                on_save()
            if since == 0:
                began = time.perf_counter()
