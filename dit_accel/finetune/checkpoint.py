"""Checkpoints that a run resumes from exactly, and the files of the result. Never pickles."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.finetune.config import Settings
from dit_accel.finetune.student import Student, inference_config
from dit_accel.inputs.data import read_object
from dit_accel.inputs.fields import expect
from dit_accel.inputs.tensors import open_tensors
from dit_accel.media.files import atomic

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


TENSORS, STATE = "tensors.safetensors", "state.json"
_NAME = re.compile(r"checkpoint-[0-9]{8}")


@dataclass
class Training:
    """Everything that changes from step to step; names → tensors.

    The draws of a step are seeded by its number, so no random state has to be kept.
    """

    live: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    scaler: Any = None
    step: int = 0

    def save(self, out: Path, settings: Settings) -> None:
        """Write checkpoint-<step>; older ones go once it is whole."""
        from safetensors.torch import save_file

        tensors = {f"live.{name}": p for name, p in self.live.items()}
        tensors |= {f"average.{name}": x for name, x in self.average.items()}
        for name, moments in zip(self.live, self._moments(), strict=True):
            tensors |= {f"adam.{name}.{part}": x for part, x in moments.items()}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        scaler = self.scaler.state_dict() if self.scaler is not None else None
        state = {"step": self.step, "scaler": scaler, "settings": settings.to_dict()}
        with _whole(out / f"checkpoint-{self.step:08d}") as part:
            save_file(tensors, part / TENSORS)
            (part / STATE).write_text(json.dumps(state, indent=1) + "\n", "utf-8")
        for old in checkpoints(out)[:-1]:
            shutil.rmtree(old)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Continue from this checkpoint; ValueError when it is of another model."""
        with open_tensors(folder / TENSORS, "checkpoint") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        moments: list[dict[str, Tensor]] = []
        for name, p in self.live.items():
            stored = tensors.get(f"live.{name}")
            if stored is None or stored.shape != p.shape:
                raise ValueError(f"{folder} is of another model: it holds no {name} of this shape")
            p.copy_(stored)
            if name in self.average:
                self.average[name].copy_(tensors[f"average.{name}"])
            prefix = f"adam.{name}."
            own = (n for n in tensors if n.startswith(prefix))
            moments.append({n.removeprefix(prefix): tensors[n] for n in own})
        groups = self.optimizer.state_dict()["param_groups"]
        adam = {i: m for i, m in enumerate(moments) if m}
        self.optimizer.load_state_dict({"state": adam, "param_groups": groups})
        state = read_state(folder)
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def _moments(self) -> list[dict[str, Tensor]]:
        """AdamW's tensors of each parameter, in the order of `live`; empty before a step."""
        return [dict(self.optimizer.state.get(p, {})) for p in self.live.values()]


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints in `out`, oldest first; folders of other names are the user's."""
    found = (p for p in out.glob("checkpoint-*") if _NAME.fullmatch(p.name))
    return sorted(p for p in found if (p / STATE).is_file())


def read_state(folder: Path) -> dict[str, Any]:
    """step, scaler and settings of a checkpoint; ValueError when they cannot be read."""
    state = read_object(folder / STATE, "checkpoint")
    for key, kind in (("step", int), ("settings", dict)):
        expect(f"checkpoint {folder / STATE}: {key}", state.get(key), kind)
    return state


def save_result(
    out: Path, pipe: DiffusionPipeline, student: Student, settings: Settings
) -> list[Path]:
    """Write what the student holds now; the files and folders that were written.

    sla.safetensors for SLA(weights=…), of another method that of its name, preset.json for
    `--method`, and beside them transformer/ (diffusers format) after full training or lora/ after
    LoRA training.
    """
    weights, preset = out / f"{settings.method.name}.safetensors", out / "preset.json"
    frozen = {name: x.detach() for name, x in student.tensors().items()}
    with atomic(weights) as temporary:
        settings.method.with_weights(frozen).save(temporary)
    config = inference_config(settings.method, settings).to_dict()
    config["method"]["weights"] = weights.name  # found beside the preset: the folder can move
    with atomic(preset) as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    written = [weights, preset]
    if settings.train == "full":
        written.append(out / "transformer")
        with _whole(written[-1]) as part:
            student.transformer.save_pretrained(str(part))
    elif settings.train == "lora":
        from peft import get_peft_model_state_dict

        layers = get_peft_model_state_dict(student.transformer)
        written.append(out / "lora")
        with _whole(written[-1]) as part:
            pipe.save_lora_weights(str(part), transformer_lora_layers=layers)
    return written


@contextmanager
def _whole(final: Path) -> Iterator[Path]:
    """A folder that takes the place of `final` when the block ends well, and else is removed."""
    part, old = (final.with_name(f".{final.name}.{kind}") for kind in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(part, final)
    finally:
        for left in (part, old) if final.exists() else (part,):
            shutil.rmtree(left, ignore_errors=True)
