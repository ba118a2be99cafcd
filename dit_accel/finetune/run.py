"""A whole run, from settings to files: everything that can be refused is refused first."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.finetune import prepare
from dit_accel.finetune.average import Average
from dit_accel.finetune.checkpoint import Training, checkpoints, read_state, save_result
from dit_accel.finetune.config import Settings
from dit_accel.finetune.data import INDEX, LatentData, check_data, read_index
from dit_accel.finetune.loop import Log, Trainer, draw_seed, parameter_groups, trained
from dit_accel.finetune.student import Teacher, build
from dit_accel.finetune.validate import DRAWS, Clips, velocity_error
from dit_accel.generation.loading import EMBEDDED, Defaults, find_model, load_pipeline
from dit_accel.generation.request import Request, of_any_prompt
from dit_accel.inputs.prompts import read_prompts
from dit_accel.media.files import check_folder, check_own
from dit_accel.media.lock import held

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


ProgressFn = Callable[[str, int, int | None], None]
_DTYPE = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Result:
    """files: what was written; velocity_error: to the dense model, before and after."""

    files: list[Path]
    velocity_error: tuple[float, float]
    steps: int


def finetune(
    settings: Settings, resume: bool = False, progress: ProgressFn = lambda *state: None
) -> Result:
    """Train a method as `settings` say and write the result to settings.out.

    Raises ValueError, before training, for what cannot work; RuntimeError when training diverges.
    """
    out = check_folder(settings.out)
    own = f"{settings.method.name}.safetensors"
    results = (own, "preset.json", "transformer", "lora", "validation")
    check_own(out, "log.jsonl", results, mark=b'"settings"')
    start = _start(out, settings, resume)
    prompts = read_prompts(settings.prompts or EMBEDDED.parent / "prompts.txt")
    if settings.data == "self":
        _check_samples(check_data(out / "data"), _captions(settings, prompts), start)
    shown = read_prompts(settings.validation) if settings.validation else prompts
    find_model(settings.model)
    accelerator = _accelerator(settings)
    first = accelerator.is_main_process
    show = progress if first else lambda *state: None
    pipe, defaults = _load(settings, accelerator, show)
    with held(out) if first else contextlib.nullcontext():
        return _train(settings, accelerator, pipe, defaults, prompts, shown, start, show)


def _train(
    settings: Settings,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    defaults: Defaults,
    prompts: list[str],
    shown: list[str],
    start: Path | None,
    show: ProgressFn,
) -> Result:
    """The run itself, once nothing can be refused without its data any more."""
    out, first = Path(settings.out), accelerator.is_main_process
    folder = _data(settings, accelerator, pipe, defaults, prompts, show)
    data = LatentData(folder, type(pipe.transformer).__name__)
    guidance = settings.guidance or defaults.guidance_scale or 1.0
    trainer = _trainer(settings, accelerator, pipe, data, guidance)
    log: Log | None = None
    if first and start is None:  # before the clips: it tells whose the folder is
        log = Log(out / "log.jsonl", 0)
        about = {"clips": len(data), "processes": accelerator.num_processes}
        log(step=0, settings=settings.to_dict(), **about)
    clips = None
    if first and settings.clips:
        with accelerator.autocast(), trainer.teacher.dense():
            clips = Clips.make(pipe, defaults, shown[: settings.clips], out / "validation", show)
    if start is not None:
        trainer.training.load(start)
        log = Log(out / "log.jsonl", trainer.training.step) if first else None
    books = _Books(trainer, clips, log)
    if start is None:
        books.validate()
    trainer.run(books.log, show, books.validate, lambda: books.save(out))
    accelerator.wait_for_everyone()
    files = []
    if first:
        with trainer.average.in_place():
            files = save_result(out, pipe, trainer.student, settings)
    return Result(files, books.errors(), trainer.training.step)


def prepare_data(settings: Settings, clips: str, progress: ProgressFn = lambda *state: None) -> int:
    """Encode the clips of a captioned folder into settings.data; how many there are."""
    if settings.data == "self":
        raise ValueError("--prepare writes to a folder: name it with --data")
    folder = check_data(settings.data)
    sources = prepare.read_captions(Path(clips))
    pipe, defaults = _load(settings, _accelerator(settings), progress)
    prepare.encode_clips(pipe, defaults, Path(clips), folder, progress)
    prepare.finish(pipe, defaults, [caption for caption, _ in sources], folder)
    return len(sources)


def _start(out: Path, settings: Settings, resume: bool) -> Path | None:
    """The checkpoint to go on from; ValueError when it does not suit what is asked."""
    found = checkpoints(out)
    if not resume:
        if found:
            raise ValueError(
                f"{out} holds a run: --resume goes on with it, or choose another folder"
            )
        return None
    if not found:
        raise ValueError(f"{out} holds no checkpoint to resume from: leave --resume out")
    settings.check_resumes(read_state(found[-1])["settings"])
    return found[-1]


def _captions(settings: Settings, prompts: list[str]) -> list[str]:
    """The prompt of each of the model's own samples."""
    return [prompts[i % len(prompts)] for i in range(settings.samples)]


def _check_samples(folder: Path, captions: list[str], start: Path | None) -> None:
    """ValueError where a run that is to go on has learned from samples of other prompts."""
    if start is None or not (folder / INDEX).is_file():
        return
    stored = [sample.get("caption") for sample in read_index(folder)["samples"]]
    if stored != captions:
        raise ValueError(
            f"the run in {folder.parent} was started with other prompts than are given now: give "
            "the same, or choose another output folder"
        )


def _accelerator(settings: Settings) -> Accelerator:
    from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

    patient = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # data are made one process apart
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        cpu=settings.device == "cpu",
        kwargs_handlers=[patient],
    )
    plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in plain:
        raise ValueError(
            f"fine-tuning runs on one device or data-parallel, not {accelerator.distributed_type}"
        )
    return accelerator


def _load(
    settings: Settings, accelerator: Accelerator, progress: ProgressFn
) -> tuple[DiffusionPipeline, Defaults]:
    progress("loading", 0, None)
    device, dtype = str(accelerator.device), _DTYPE[settings.precision]
    pipe, defaults = load_pipeline(settings.model, device, dtype)
    if settings.train == "lora" and not hasattr(pipe, "save_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} has no LoRA format: train projection or full")
    given: dict[str, Any] = dict(zip(("width", "height"), settings.size or (), strict=False))
    given |= {"num_frames": settings.frames} if settings.frames else {}
    for part in (pipe.vae, *(getattr(pipe, f"text_encoder{n}", None) for n in ("", "_2", "_3"))):
        if part is not None:
            part.requires_grad_(False)
    width, height = settings.size or (None, None)
    any_ = Request("any", width=width, height=height, frames=settings.frames)
    of_any_prompt(pipe, defaults, any_)  # a size that the model cannot make is refused here
    return pipe, replace(defaults, **given)


def _data(
    settings: Settings,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    defaults: Defaults,
    prompts: list[str],
    progress: ProgressFn,
) -> Path:
    """The folder of latents; with data="self", made here by all processes together."""
    if settings.data != "self":
        return Path(settings.data)
    folder = Path(settings.out) / "data"
    part = (accelerator.process_index, accelerator.num_processes)
    number, seed = settings.samples, settings.seed
    with accelerator.autocast():
        prepare.own_samples(
            pipe, defaults, prompts, number, seed, folder, progress, part, settings.batch
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        prepare.finish(pipe, defaults, _captions(settings, prompts), folder)
    accelerator.wait_for_everyone()
    return folder


def _trainer(
    settings: Settings,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    data: LatentData,
    guidance: float,
) -> Trainer:
    """Student, teacher, optimizer and books; what the model refuses is refused here."""
    sample = data.draw(1, draw_seed(settings, 0), 0.0)
    sample = sample.to(accelerator.device, pipe.transformer.dtype)
    substeps = settings.substeps or 1
    teacher = Teacher(pipe.transformer, settings.train, substeps, guidance)
    with accelerator.autocast():
        student = build(pipe.transformer, settings, sample)
    teacher.model.eval()
    optimizer = torch.optim.AdamW(
        parameter_groups(student, settings), weight_decay=settings.weight_decay
    )
    live = trained(student, optimizer)
    wrapped, prepared = accelerator.prepare(student, optimizer)
    average = Average(live, settings.ema)
    training = Training(live, average.values, optimizer, accelerator.scaler)
    return Trainer(
        settings, accelerator, student, wrapped, teacher, data, prepared, training, average
    )


class _Books:
    """The log, the validations and the checkpoints of the first process; nothing on the others."""

    def __init__(self, trainer: Trainer, clips: Clips | None, log: Log | None) -> None:
        self.trainer, self.clips, self._log = trainer, clips, log

    def log(self, **values: object) -> None:
        if self._log is not None:
            self._log(**values)

    def validate(self) -> None:
        """Log how close the averaged weights are to the dense model."""
        if self._log is None:
            return
        t = self.trainer
        with self._averaged():
            batches = t.validation_batches(DRAWS)
            error = velocity_error(t.student, t.teacher, batches, t.settings)
            near = self.clips.compare(t.student, t.settings, t.training.step) if self.clips else []
        self.log(step=t.training.step, velocity_error=error, clips=near)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        with self.trainer.average.in_place(), self.trainer.accelerator.autocast():
            yield

    def save(self, out: Path) -> None:
        if self._log is not None:
            self.trainer.training.save(out, self.trainer.settings)

    def errors(self) -> tuple[float, float]:
        """The first and the last velocity error that the log holds."""
        if self._log is None:
            return (float("nan"), float("nan"))
        lines = (json.loads(line) for line in self._log.path.read_text("utf-8").split("\n")[:-1])
        every = [line["velocity_error"] for line in lines if "velocity_error" in line]
        return (every[0], every[-1]) if every else (float("nan"), float("nan"))
