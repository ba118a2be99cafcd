"""dit_accel makes diffusers' video and image transformers fast with one line.

    import dit_accel
    handle = dit_accel.accelerate(pipe)

Nothing heavy is imported here: names resolve on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what an editor and a type checker know of the names below
    from dit_accel.api import (
        accelerate,
        accelerated,
        attention,
        graphed,
        register_adapter,
        restore,
        step_cached,
    )
    from dit_accel.checkpoints import load_checkpoint
    from dit_accel.config import AccelConfig
    from dit_accel.generation.at_speed import at_speed
    from dit_accel.methods.dense import Dense
    from dit_accel.methods.pooled import Pooled
    from dit_accel.methods.rectified import Rectified
    from dit_accel.methods.rettention import Rettention
    from dit_accel.methods.shared import SharedResidual
    from dit_accel.methods.sla import SLA
    from dit_accel.methods.ssta import SSTA
    from dit_accel.methods.topk import TopK
    from dit_accel.methods.vsa import VSA
    from dit_accel.pruning.config import TokenPruning
    from dit_accel.schedule import Schedule

__version__ = "0.1.0"

_HOME = {
    "AccelConfig": "config",
    "Dense": "methods.dense",
    "Pooled": "methods.pooled",
    "Rectified": "methods.rectified",
    "Rettention": "methods.rettention",
    "SLA": "methods.sla",
    "SSTA": "methods.ssta",
    "Schedule": "schedule",
    "SharedResidual": "methods.shared",
    "TokenPruning": "pruning.config",
    "TopK": "methods.topk",
    "VSA": "methods.vsa",
    "accelerate": "api",
    "accelerated": "api",
    "at_speed": "generation.at_speed",
    "attention": "api",
    "graphed": "api",
    "load_checkpoint": "checkpoints",
    "register_adapter": "api",
    "restore": "api",
    "step_cached": "api",
}

__all__ = [
    "SLA",
    "SSTA",
    "VSA",
    "AccelConfig",
    "Dense",
    "Pooled",
    "Rectified",
    "Rettention",
    "Schedule",
    "SharedResidual",
    "TokenPruning",
    "TopK",
    "__version__",
    "accelerate",
    "accelerated",
    "at_speed",
    "attention",
    "graphed",
    "load_checkpoint",
    "methods",
    "register_adapter",
    "restore",
    "step_cached",
]


def __getattr__(name: str) -> Any:
    if name == "methods":  # the package of that name is callable
        return import_module("dit_accel.methods")
    if name in _HOME:
        return getattr(import_module(f"dit_accel.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
