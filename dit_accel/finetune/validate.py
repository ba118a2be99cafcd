"""How close the student is: velocity error at fixed draws, and clips against the dense model's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dit_accel import api
from dit_accel.config import AccelConfig
from dit_accel.finetune.config import Settings
from dit_accel.finetune.data import Batch
from dit_accel.finetune.student import Student, Teacher, inference_config, training_config
from dit_accel.generation.facts import facts_of
from dit_accel.generation.loading import Defaults
from dit_accel.generation.request import Request, arguments
from dit_accel.generation.run import generate
from dit_accel.media import video
from dit_accel.media.quality import quality

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


DRAWS = 4


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in fp32."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@torch.no_grad()
def velocity_error(
    student: Student, teacher: Teacher, batches: list[Batch], settings: Settings
) -> float:
    """Mean relative error of the sparse velocity to the dense one, at the same x_t."""
    errors = []
    for batch in batches:
        expected = teacher.velocity(batch)
        with api.accelerated(student, training_config(student, settings)):
            found = student(batch.noisy.to(student.transformer.dtype), batch.time, batch.conditions)
        errors.append(relative_error(found, expected))
    return float(np.mean(errors))


@dataclass
class Clips:
    """The dense model's clips of the validation prompts, and the comparison with them."""

    pipe: DiffusionPipeline
    defaults: Defaults
    prompts: list[str]
    folder: Path
    dense: list[np.ndarray]

    @property
    def unguided(self) -> float | None:
        """The guidance scale that is none; None where the pipeline takes none."""
        known = inspect.signature(type(self.pipe).__call__).parameters
        return 1.0 if "guidance_scale" in known else None

    @classmethod
    def make(
        cls,
        pipe: DiffusionPipeline,
        defaults: Defaults,
        prompts: list[str],
        folder: Path,
        progress: Callable[[str, int, int | None], None],
    ) -> Clips:
        """Generate the dense clips, before anything is trained."""
        clips = cls(pipe, defaults, prompts, folder, [])
        for number in range(len(prompts)):
            progress("dense validation clips", number, len(prompts))
            clips.dense.append(clips._generate(number, "dense", None))
        return clips

    def compare(self, student: Student, settings: Settings, step: int) -> list[dict[str, float]]:
        """PSNR and SSIM of the student's clips, from the same seeds, to the dense ones."""
        method = settings.method.with_weights(
            {name: x.detach() for name, x in student.tensors().items()}
        )
        found = []
        config = inference_config(method, settings)
        with api.accelerated(self.pipe, config):
            for number, reference in enumerate(self.dense):
                clip = self._generate(number, f"step-{step:06d}", config, settings)
                near = quality(reference, clip)
                found.append({"psnr": near.psnr_mean, "ssim": near.ssim_mean})
        return found

    def _generate(
        self, number: int, label: str, config: AccelConfig | None, settings: Settings | None = None
    ) -> np.ndarray:
        request = Request(self.prompts[number], seed=number)
        if settings is not None and settings.sampler is not None:  # a student of few steps
            few: dict[str, Any] = {"steps": settings.few_steps, "sampler": str(settings.sampler)}
            request = replace(request, **few, guidance=self.unguided)
        values = arguments(self.pipe, self.defaults, request)
        model = self.pipe.config.get("_name_or_path") or type(self.pipe).__name__
        fps = self.defaults.fps
        told: dict[str, Any] = {"model": model, "fps": fps, "sampler": request.sampler}
        facts = facts_of(self.pipe, values, number, config, **told)
        facts["shows"] = label
        frames = generate(self.pipe, self.defaults, request).frames
        suffix = "mp4" if len(frames) > 1 else "png"
        video.save(self.folder / f"{label}-{number}.{suffix}", frames, self.defaults.fps, facts)
        return frames
