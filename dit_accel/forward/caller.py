"""Which pipeline runs: the nearest caller that holds the transformer and a scheduler.

A transformer may serve several pipeline objects, each with a scheduler of its own, and its forward
is not told by whom it is called. The frames of the call know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from dit_accel.pipelines.denoisers import transformers_of

if TYPE_CHECKING:
    pass


class Caller(NamedTuple):
    """pipe: what holds the transformer and a scheduler. itself: one of its own methods runs."""

    pipe: object = None
    itself: bool = False


_NOTHING: dict[str, object] = {}
# id of code that called before → (that code, its name for the pipeline): looked at first. To hash
# code is to read all of it; what is held keeps its id.
_KNOWN: dict[int, tuple[CodeType, str]] = {}
# … of code that held none: looked at last.
_PASSED: dict[int, CodeType] = {}
_MOST = 4096


def caller(transformer: nn.Module, first: object = None) -> Caller:
    """Who calls this transformer now, or an empty Caller.

    first: an object that counts without a scheduler, too.
    """
    here = sys._getframe(1)
    for frame in _above(here):
        code = frame.f_code
        known = _KNOWN.get(id(code))
        if known is not None:
            value = frame.f_locals.get(known[1], frame.f_globals.get(known[1]))
            if _holds(value, transformer, first):
                return Caller(value, known[1] == "self")
        elif id(code) not in _PASSED:
            if (found := _seen_in(frame, transformer, first)) is not None:
                return found
            if len(_PASSED) == _MOST:
                _PASSED.clear()
            _PASSED[id(code)] = code
    each = (_seen_in(frame, transformer, first) for frame in _above(here))
    return next((found for found in each if found is not None), Caller())


def _seen_in(frame: FrameType, transformer: nn.Module, first: object) -> Caller | None:
    """The pipeline that a frame has a name for; what it is called is remembered."""
    for name, value in _named(frame):
        if _holds(value, transformer, first):
            _KNOWN[id(frame.f_code)] = (frame.f_code, name)
            return Caller(value, name == "self")
    return None


def _above(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _named(frame: FrameType) -> list[tuple[str, object]]:
    """What the code of a frame has names for: its locals, and the globals it speaks of."""
    spoken = (name for name in frame.f_code.co_names if name in frame.f_globals)
    return [*frame.f_locals.items(), *((name, frame.f_globals[name]) for name in spoken)]


def _holds(value: object, transformer: nn.Module, first: object) -> bool:
    """Is this object a pipeline of this transformer? Objects of other kinds are not asked."""
    own = _own(value)
    if value is not first and not _schedules(value, own):
        return False
    if any(part is transformer for part in own.values()):
        return True
    return value is not None and any(part is transformer for part in transformers_of(value))


def _schedules(value: object, own: dict[str, object]) -> bool:
    return "scheduler" in own or "scheduler" in type.__getattribute__(type(value), "__dict__")


def _own(value: object) -> dict[str, object]:
    """The attributes of an object itself; nothing of it is called."""
    if not type.__getattribute__(type(value), "__dictoffset__"):
        return _NOTHING
    try:
        return object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return _NOTHING
