"""One forward at a time: what methods and step caches keep is of one generation."""

from __future__ import annotations

import sys
import threading
import weakref
from types import FrameType

from torch import nn

_LOCK = threading.Lock()
# what keeps something from forward to forward → who ran last: its thread and its transformer
_LAST: weakref.WeakKeyDictionary[object, tuple[int, weakref.ref[nn.Module]]]
_LAST = weakref.WeakKeyDictionary()


def enter(keeper: object, transformer: nn.Module) -> None:
    """A forward of this transformer starts. keeper: what keeps something for the next one.

    Raises RuntimeError where another thread is inside of a forward that has the same keeper. One
    that ended in an exception is not.
    """
    me = threading.get_ident()
    with _LOCK:
        other, ref = _LAST.get(keeper, (me, None))
        running = None if ref is None else ref()
        if other != me and running is not None and _inside(other, running):
            raise RuntimeError(
                f"two threads run this {type(transformer).__name__} at once, and what is kept from "
                "step to step is of one generation: take a lock around each call of the pipeline, "
                "or give each thread a transformer of its own"
            )
        _LAST[keeper] = me, weakref.ref(transformer)


def _inside(thread: int, transformer: nn.Module) -> bool:
    """Is this thread inside of a call of the transformer?"""
    frame: FrameType | None = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_locals.get("self") is transformer:
            return True
        frame = frame.f_back
    return False
