"""The methods, one file each; the table maps a name to its class and is read lazily.

The package is callable: `dit_accel.methods()` lists them.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

from dit_accel.methods.base import Call, Method

_HOME = {
    "dense": ("dense", "Dense"),
    "topk": ("topk", "TopK"),
    "pooled": ("pooled", "Pooled"),
    "rectified": ("rectified", "Rectified"),
    "rettention": ("rettention", "Rettention"),
    "shared": ("shared", "SharedResidual"),
    "sla": ("sla", "SLA"),
    "vsa": ("vsa", "VSA"),
    "ssta": ("ssta", "SSTA"),
}

__all__ = ["Call", "Method", "MethodInfo", "find", "infos"]


class MethodInfo(NamedTuple):
    description: str
    paper: str
    finetuning: bool


def find(name: str) -> type[Method]:
    """The method class called `name`; ValueError lists the known names."""
    if name not in _HOME:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(_HOME)}")
    module, cls = _HOME[name]
    return getattr(import_module(f"dit_accel.methods.{module}"), cls)


def infos() -> dict[str, MethodInfo]:
    """Name → description, paper, and whether it needs fine-tuned weights to be good."""
    return {name: MethodInfo(m.description, m.paper, m.finetuning) for name, m in _all()}


def _all() -> Iterator[tuple[str, type[Method]]]:
    return ((name, find(name)) for name in _HOME)


class _Methods(ModuleType):
    def __call__(self) -> dict[str, MethodInfo]:
        return infos()


sys.modules[__name__].__class__ = _Methods
