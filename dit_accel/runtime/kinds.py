"""What two forwards of a transformer have in common that one recording can serve."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten

from dit_accel.parallel.context import config_of
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.interception import interceptor
from dit_accel.runtime.recorder import NotRecorded, Recorder

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
# what PEFT's layers keep in plain attributes
_ADAPTER = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")


class Given(NamedTuple):
    """The arguments of a forward. leaves: tensors and plain values, spec: how they lie. read: of
    each leaf, whether a replay reads it. keys: of each, what one graph serves."""

    leaves: list[Any]
    spec: TreeSpec
    read: list[bool]
    keys: tuple[Hashable, ...]

    @classmethod
    def of(cls, args: Any, kwargs: Any, recorder: Recorder) -> Given:
        """NotRecorded for an argument that is neither a tensor nor a plain value."""
        leaves, spec = tree_flatten((args, kwargs))
        read = [isinstance(x, Tensor) and recorder.reads(x) for x in leaves]
        return cls(leaves, spec, read, tuple(map(_key, leaves, read)))


class Build(NamedTuple):
    """Of what a transformer is made. modules: those inside of it; digest: of them, of their
    adapters and of where tensors lie; shared: by other processes, too."""

    modules: list[nn.Module]
    digest: int
    shared: bool

    @classmethod
    def of(cls, transformer: nn.Module) -> Build:
        """It takes a millisecond."""
        modules = [m for m in transformer.modules() if m is not transformer]
        tensors = (*transformer.parameters(), *transformer.buffers())
        digest = hash((*map(_module, modules), *(x.data_ptr() for x in tensors)))
        shared = any(config_of(getattr(m, "processor", None)) is not None for m in modules)
        return cls(modules, digest, shared)

    def hooked(self) -> list[nn.Module]:
        """The modules on which something hangs now; guidance hangs it there for one pass of a step.
        A transformer's own hooks run outside of its forward."""
        found = ((m, vars(m)) for m in self.modules)
        names = ("_forward_hooks", "_forward_pre_hooks")
        return [m for m, own in found if own[names[0]] or own[names[1]] or "forward" in own]


def hooks(m: nn.Module) -> Hashable:
    """What hangs on a module."""
    return id(m), len(m._forward_hooks), len(m._forward_pre_hooks), id(vars(m).get("forward"))


def obstacle(build: Build, hooked: list[nn.Module], engine: Engine | None = None) -> str:
    """What makes of each forward another one, or "". hooked: what has hooks, the transformer's own
    among them."""
    if engine is not None and engine.span is not None:
        return "token pruning decides on the way which tokens run"
    if build.shared:
        return "other processes share the sequence"
    for own in map(vars, hooked):
        if "_hf_hook" in own:
            return "weights come and go by accelerate's offload"
        acting = getattr(own.get("_diffusers_hook"), "hooks", ())
        if acting:
            return f"diffusers' hook {min(acting)!r} acts on the way"
    return ""


def _module(m: nn.Module) -> Hashable:
    own = vars(m)
    return id(m), id(own.get("processor")), *(str(own[name]) for name in _ADAPTER if name in own)


def mode() -> Hashable:
    """Under which modes of PyTorch a forward runs."""
    kind = "cuda"
    cast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
    return torch.is_inference_mode_enabled(), cast, interceptor()


def _key(x: object, read: bool) -> Hashable:
    if isinstance(x, Tensor):
        held = None if read else str(x.tolist())
        return tuple(x.shape), x.stride(), x.dtype, str(x.device), held
    if isinstance(x, PLAIN):
        return type(x), x
    raise NotRecorded(
        f"a forward that is given {type(x).__name__} cannot be a CUDA graph: leave graphs out"
    )
