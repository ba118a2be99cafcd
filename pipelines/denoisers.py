"""Which modules of a pipeline denoise, whatever they are called and wrapped in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import nn

from dit_accel.pipelines import registry

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


# Where diffusers' pipelines keep a transformer, of whatever class.
SLOTS = ("transformer", "transformer_2", "unconditional_transformer")


class Holder(Protocol):
    """What has the slot of a transformer."""

    transformer: nn.Module


# What `accelerate` takes: a pipeline, a transformer, or what holds one.
Pipe: TypeAlias = "DiffusionPipeline | nn.Module | Holder"


def transformers_of(pipe: object) -> list[nn.Module]:
    """The pipeline's denoising transformers; empty for a pipeline without one."""
    return list(denoisers(pipe).values())


def denoisers(pipe: object) -> dict[str, nn.Module]:
    """Name → denoising transformer of a pipeline, or of one that is a transformer itself.

    Those are the modules of a known class, and what stands in one of SLOTS. What torch.compile,
    DDP, FSDP or PEFT put around a transformer is looked through.
    """
    if isinstance(pipe, nn.Module) and registry.name_of(unwrapped(pipe)):
        return {type(pipe).__name__: unwrapped(pipe)}
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in _modules(pipe):
        module = unwrapped(module)
        if name in SLOTS or registry.name_of(module):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def unwrapped(module: nn.Module) -> nn.Module:
    """The known transformer inside wrappers that hold one module each; without one, `module`, or
    what torch.compile made it of."""
    inner = module
    while not registry.name_of(inner):
        children = list(inner.children())
        if len(children) != 1:
            return getattr(module, "_orig_mod", module)
        inner = children[0]
    return inner


def call(pipe: DiffusionPipeline, **arguments: object) -> Any:
    """What a pipeline makes of these arguments: its classes can be called, their base cannot."""
    run: Any = pipe
    return run(**arguments)


def _modules(pipe: object) -> Iterator[tuple[str, nn.Module]]:
    """What an object holds as attributes or in lists, SLOTS first."""
    held = {name: getattr(pipe, name, None) for name in SLOTS}
    held |= vars(type(pipe)) | getattr(pipe, "__dict__", {})
    held |= dict(pipe.named_children()) if isinstance(pipe, nn.Module) else {}
    for name, value in held.items():
        if isinstance(value, (list, tuple, nn.ModuleList)):
            parts = [(f"{name}.{i}", part) for i, part in enumerate(value)]
        else:
            parts = [(name, value)]
        yield from ((n, part) for n, part in parts if isinstance(part, nn.Module))
