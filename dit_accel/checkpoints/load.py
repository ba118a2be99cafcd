"""A checkpoint into a stock pipeline: weights, method, schedule, sampler."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import Tensor

from dit_accel import api
from dit_accel.checkpoints import families, place
from dit_accel.checkpoints.content import Checkpoint
from dit_accel.checkpoints.files import find, sources
from dit_accel.config import AccelConfig, Options
from dit_accel.methods.base import Method
from dit_accel.methods.learned import SECOND, Learned
from dit_accel.pipelines import registry
from dit_accel.pipelines.base import head_dim
from dit_accel.pipelines.denoisers import SLOTS, transformers_of
from dit_accel.samplers import install
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


@dataclass
class Loaded:
    """What `load_checkpoint` did.

    Args:
        family: what the checkpoint is.
        found: names in the files that were used. unused: those that were not. missing: names of the
            transformers' weights that the files, meant to be whole, do not hold.
        config: the acceleration it was trained for; None: dense attention.
        arguments: what to call the pipeline with, `pipe(prompt, **loaded.arguments)`.
        sampler: the grid of steps, in words; None: the pipeline's own scheduler.
        handle: of `accelerate`, or None.
        notes: sentences for the user.
    """

    family: str
    found: list[str]
    unused: list[str]
    missing: list[str]
    config: AccelConfig | None
    arguments: dict[str, Any]
    sampler: str | None
    handle: api.Handle | None = None
    notes: list[str] = field(default_factory=list)
    _undo: list[Callable[[], object]] = field(default_factory=list)

    def restore(self) -> None:
        """Attention, scheduler and boundary as they were. The weights stay."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"{self.family}: {len(self.found)} tensors read"]
        for what, names in (("unused", self.unused), ("missing", self.missing)):
            lines += [f"  {what}: {name}" for name in names]
        if self.config is not None:
            method = self.config.method
            most = getattr(method, "most", None)  # of a method that keeps a number
            kept = f"{method.keep:.0%} of the key blocks" if most is None else f"{most} tiles"
            lines.append(f"  attention: {method.name}, {kept} kept")
        lines += [f"  sampler: {self.sampler}"] if self.sampler else []
        asked = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        lines += [f"  call it with {asked}"] if asked else []
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def read(*paths: str | Path, into: str | None = None) -> list[Checkpoint]:
    """The checkpoints in files, folders or Hugging Face ids, each with its slot if that is told.

    Raises ValueError for a file that cannot be read or that no family recognises.
    """
    found = []
    for path in paths:
        for source in sources(find(path)):
            checkpoint = families.of(source).read(source)
            checkpoint.slot = into or source.slot or _told(source.path.name.lower())
            found.append(checkpoint)
    return found


def load_checkpoint(
    pipe: DiffusionPipeline,
    *paths: str | Path,
    base: str | Path | None = None,
    into: str | None = None,
    keep: float | None = None,
    sampler: str | bool = True,
    attention: bool = True,
    **options: Unpack[Options],
) -> Loaded:
    """Load a sparse or few-step checkpoint into a stock pipeline, and run it as it was trained.

    Weights are copied into the pipeline's transformers, attention is accelerated with the method
    and the share of blocks it was trained with, and the scheduler becomes that of its few steps.

    Args:
        pipe: a diffusers pipeline of the model that the checkpoint was trained from.
        paths: files (.pth, .safetensors), folders or Hugging Face ids; two for Wan 2.2's experts.
        base: the weights that the checkpoint was trained from: only the difference to them is
            added, to whatever fine-tuned weights the pipeline has.
        into: "transformer" or "transformer_2", where neither file's name nor pipeline tells.
        keep: share of key blocks, instead of the one it was trained with.
        sampler: True: the one it was distilled for; False: the pipeline's own; or one in words.
        attention: False leaves attention as it is; `config` of the result says how it was trained.
        options: of `accelerate`, such as min_tokens or schedule.

    Raises ValueError, before anything is changed, for a file that cannot be read, tensors that do
    not fit the model, and a model that has no such transformer.
    """
    parts = read(*paths, into=into)
    if not parts:
        raise ValueError("load_checkpoint takes at least one file, folder or hub id")
    origins = [families.stock(s) for s in sources(find(base))] if base is not None else []
    jobs, missing = place.prepare(pipe, parts, origins, into is not None or len(parts) > 1)
    schedule = options.pop("schedule", None) or Schedule(warmup=0)
    method = together(parts, keep)
    if method is not None:
        _check(pipe, method)
    words = parts[0].sampler if sampler is True else sampler or None
    loaded = Loaded(
        parts[0].family,
        [name for part in parts for name in part.used],
        [name for part in parts for name in part.unused],
        missing,
        None if method is None else AccelConfig(method, schedule),
        dict(parts[0].arguments) if sampler is True else {},
        words,
        notes=[note for part in parts for note in part.notes],
    )
    try:
        _set_up(pipe, loaded, parts[0], options if attention else None)
        place.write(jobs)
    except BaseException:
        loaded.restore()
        raise
    return loaded


def _set_up(
    pipe: DiffusionPipeline, loaded: Loaded, part: Checkpoint, options: Options | None
) -> None:
    """Sampler, attention (None: as it is) and boundary; each with the way back."""
    undo = loaded._undo
    if loaded.sampler:
        undo.append(_sample(pipe, loaded.sampler, part.shifts))
    if loaded.config is not None and options is not None:
        before = api.standing(pipe)
        loaded.handle = api.accelerate(pipe, loaded.config, **options)
        loaded.config = loaded.handle.config
        undo.append(partial(_give_back, loaded.handle, before))
    if part.boundary is not None and getattr(pipe, SLOTS[1], None) is not None:
        undo.append(_cross_at(pipe, part.boundary))


def _give_back(handle: api.Handle, before: Callable[[], None]) -> None:
    """Attention as it was, unless the user has accelerated anew or restored since."""
    if handle.active:
        handle.restore()
        before()


def together(parts: list[Checkpoint], keep: float | None = None) -> Method | None:
    """The method of all parts with the learned tensors of each; ValueError where they differ."""
    first = parts[0]
    if any((part.family, part.method) != (first.family, first.method) for part in parts):
        kinds = ", ".join(sorted({part.family for part in parts}))
        raise ValueError(f"the files are of several kinds ({kinds}): load one after another")
    if len({part.slot for part in parts}) < len(parts):
        raise ValueError("two files are for the same transformer: their names tell high from low")
    method = first.method
    if method is None:
        return None
    method = method if keep is None else replace(method, keep=keep)
    learned: dict[str, Tensor] = {}
    for part in parts:
        prefix = SECOND if part.slot == SLOTS[1] else ""
        learned |= {f"{prefix}{name}": x for name, x in part.learned.items()}
    return method.with_weights(learned) if isinstance(method, Learned) else method


def _told(name: str) -> str | None:
    """Wan 2.2's experts by the words of the file's name."""
    low, high = (
        re.search(rf"(?<![a-z]){word}(?:noise)?(?![a-z]|[-_ ]?rank)", name) is not None
        for word in ("low", "high")
    )
    return None if low == high else SLOTS[low]


def _check(pipe: DiffusionPipeline, method: Method) -> None:
    """What `accelerate` refuses of the learned tensors, before anything is changed."""
    for module in transformers_of(pipe):
        modules = registry.find(module).attentions(module)
        method.check(head_dim(next(iter(modules.values()))), len(modules))


def _sample(
    pipe: DiffusionPipeline, words: str, shifts: tuple[float, float] | None
) -> Callable[[], object]:
    """The checkpoint's scheduler, of MiniMax H3 both; the way back."""
    if shifts is None:
        return install(pipe, words)
    from dit_accel.samplers.schedulers import H3GridScheduler

    slots = ("scheduler", "audio_scheduler")
    before = {slot: getattr(pipe, slot, None) for slot in slots}
    for slot, shift in zip(slots, shifts, strict=True):
        setattr(pipe, slot, H3GridScheduler(words, shift))

    def undo() -> None:
        for slot, old in before.items():
            setattr(pipe, slot, old)

    return undo


def _cross_at(pipe: DiffusionPipeline, boundary: float) -> Callable[[], None]:
    before = pipe.config.get("boundary_ratio")
    pipe.register_to_config(boundary_ratio=boundary)
    return lambda: pipe.register_to_config(boundary_ratio=before)
