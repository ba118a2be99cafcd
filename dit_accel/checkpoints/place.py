"""Where a checkpoint's tensors go in a pipeline; nothing is written until all of them fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dit_accel.checkpoints.content import Checkpoint, Entry
from dit_accel.pipelines.denoisers import SLOTS

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


Job = tuple[Tensor, Entry, bool]  # parameter, tensor, whether it is added


def prepare(
    pipe: DiffusionPipeline, parts: list[Checkpoint], origins: list[Checkpoint], told: bool
) -> tuple[list[Job], list[str]]:
    """What is to be written, and the names of weights that whole checkpoints lack.

    origins: what the parts were trained from, where only the difference counts. told: the user or
    their number says which transformer a part is for. Raises ValueError for what does not fit.
    """
    modules = [_target(pipe, part, told) for part in parts]
    jobs, missing = [], []
    for module, part in zip(modules, parts, strict=True):
        part = difference(part, origins) if origins else part
        jobs += _plan(module, part)
        names = (name for name, _ in module.named_parameters() if part.whole)
        missing += [name for name in names if name not in part.weights]
    return jobs, missing


@torch.no_grad()
def write(jobs: Iterable[Job]) -> None:
    """Copy, or add."""
    for own, entry, added in jobs:
        x = entry.load().to(own.device)
        own.copy_(own.float() + x if added else x)


def _target(pipe: DiffusionPipeline, part: Checkpoint, told: bool) -> nn.Module:
    slots = [slot for slot in SLOTS if isinstance(getattr(pipe, slot, None), nn.Module)]
    if not slots:
        raise ValueError(f"{type(pipe).__name__} has no transformer to load a checkpoint into")
    if len(slots) == 1 and not told:
        part.slot = slots[0]
    if part.slot is None and len(slots) == 1:
        raise ValueError(f"{type(pipe).__name__} has one transformer: give one file, not several")
    if part.slot is None:
        raise ValueError(
            f"{type(pipe).__name__} has two transformers, and the file's name has neither high nor "
            'low in it: say into="transformer" or into="transformer_2"'
        )
    if part.slot not in slots:
        raise ValueError(f"{type(pipe).__name__} has no {part.slot}: leave that part out")
    return getattr(pipe, part.slot)


def difference(part: Checkpoint, origins: list[Checkpoint]) -> Checkpoint:
    """The part as what it adds to the weights that it was trained from."""
    origin = next((o for o in origins if o.slot in (None, part.slot)), origins[0])
    lost = sorted(set(part.weights) - set(origin.weights))
    if lost:
        raise ValueError(f"base lacks {', '.join(lost[:5])}: give what it was trained from")
    changes = {
        name: Entry(entry.shape, partial(_minus, entry, origin.weights[name]))
        for name, entry in part.weights.items()
    }
    # the lists of names are shared: what finds no place is told by the part itself
    return replace(part, weights={}, changes=changes | part.changes, whole=False)


def _minus(a: Entry, b: Entry) -> Tensor:
    return a.load().float() - b.load().float()


def _plan(module: nn.Module, part: Checkpoint) -> list[Job]:
    """What is to be written. Names without a place go to `unused`; other shapes are refused."""
    kind = type(module).__name__
    if getattr(module, "peft_config", None):
        raise ValueError(f"{kind} has a LoRA: fuse or unload it before loading a checkpoint")
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    jobs: list[Job] = []
    for entries, added in ((part.weights, False), (part.changes, True)):
        for told, entry in entries.items():
            name = told if told in own else told.removesuffix(".weight")  # a table has no module
            if name not in own:
                _homeless(part, told)
                continue
            if own[name].is_meta:
                raise ValueError(
                    f"{name} is not in memory: load the checkpoint before offloading is enabled"
                )
            if _is_packed(own[name]):
                raise ValueError(
                    f"{name} of {kind} is in eight bits or another packed form: load the "
                    "checkpoint first, quantise afterwards"
                )
            if tuple(own[name].shape) != entry.shape:
                raise ValueError(
                    f"{name} is {list(entry.shape)} in the checkpoint, but {kind} has "
                    f"{list(own[name].shape)}: it was trained from another model"
                )
            jobs.append((own[name], entry, added))
    if not jobs and (part.weights or part.changes):
        raise ValueError(
            f"none of the checkpoint's tensors ({', '.join(part.unused[:3])} …) is one of "
            f"{kind}'s: it was trained from another model"
        )
    return jobs


def _is_packed(own: Tensor) -> bool:
    """Is it not the plain numbers of a weight?"""
    integers = isinstance(own, nn.Parameter) and not own.is_floating_point()
    return integers or type(own.data) is not Tensor


def _homeless(part: Checkpoint, name: str) -> None:
    names = part.origin.get(name, [name])
    part.unused.extend(names)
    part.used[:] = [n for n in part.used if n not in names]
