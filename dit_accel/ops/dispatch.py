"""Which implementation serves a call, and why the others do not.

Each dit_accel/kernels/<op>/<name>.py exports a function of the op's name and, unless it serves
everything, `supports(q, **features) -> str | None` (None is yes, a string says why not). An op
"<op>.backward" is the function `backward` of the same file, under the same `supports`.
DIT_ACCEL_KERNELS=reference|torch|triton, read at each call, forces one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from torch import Tensor

NAMES = ("triton", "torch", "reference")


@dataclass(frozen=True)
class Implementation:
    """The function that serves an op, and the name of the file it comes from."""

    name: str
    fn: Callable


_RECORD: ContextVar[list[str] | None] = ContextVar("dit_accel_dispatch_record", default=None)


@contextmanager
def recording() -> Iterator[list[str]]:
    """Collect "<op>/<name>" of every choice made inside the with block."""
    used: list[str] = []
    token = _RECORD.set(used)
    try:
        yield used
    finally:
        _RECORD.reset(token)


def select(op: str, q: Tensor, **features: object) -> Implementation:
    """The first implementation of `op` that serves q: triton, torch, reference.

    Raises ValueError for an unknown DIT_ACCEL_KERNELS, RuntimeError when none (or the forced one)
    can serve, with the reasons.
    """
    reasons = []
    for name in _wanted():
        found, reason = _find(op, name, q, features)
        if found:
            if (record := _RECORD.get()) is not None:
                record.append(f"{op}/{name}")
            return found
        reasons.append(f"{name}: {reason}")
    raise RuntimeError(f"no implementation of {op} serves this call ({'; '.join(reasons)})")


def explain(op: str, q: Tensor, **features: object) -> list[tuple[str, str | None]]:
    """Every implementation with None if it serves q, or the reason why not."""
    return [(name, _find(op, name, q, features)[1]) for name in NAMES]


def _wanted() -> tuple[str, ...]:
    forced = os.environ.get("DIT_ACCEL_KERNELS", "")
    if forced and forced not in NAMES:
        raise ValueError(f"DIT_ACCEL_KERNELS is one of {', '.join(NAMES)}, not {forced!r}")
    return (forced,) if forced else NAMES


def _find(
    op: str, name: str, q: Tensor, features: dict[str, object]
) -> tuple[Implementation | None, str | None]:
    if name == "triton" and q.device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return None, f"it needs a CUDA tensor, not one on {q.device.type}"
    folder, _, part = op.partition(".")
    module, reason = _module(f"dit_accel.kernels.{folder}.{name}")
    fn = getattr(module, part or folder, None)
    if module is None or fn is None:
        return None, reason or f"it has no {part or folder}"
    if hasattr(module, "supports"):
        reason = module.supports(q, **features)
    return (Implementation(name, fn), None) if reason is None else (None, reason)


def _module(path: str) -> tuple[ModuleType | None, str | None]:
    try:
        return import_module(path), None
    except ModuleNotFoundError as error:
        # Only what is absent is a reason; a broken import inside a kernel is a fault and is raised.
        if error.name == "triton":
            return None, "triton is not installed"
        if error.name == path:
            return None, "it does not exist"
        raise
