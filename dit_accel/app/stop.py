"""Stopping a pipeline that is running: an exception at the next layer of any of its models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event
from typing import Any

from torch import nn

from dit_accel.pipelines.denoisers import transformers_of


class Cancelled(Exception):
    """The visitor pressed cancel, left the page or asked for something else."""


class Leash(Event):
    """Set by hand, or by nobody listening for `grace` seconds."""

    def __init__(self, grace: float = 20.0) -> None:
        super().__init__()
        self.grace, self.listeners, self._left = grace, 0, time.monotonic()

    def is_set(self) -> bool:
        gone = not self.listeners and time.monotonic() - self._left > self.grace
        return gone or super().is_set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Somebody listens while the block runs."""
        self.listeners += 1
        try:
            yield
        finally:
            self.listeners -= 1
            self._left = time.monotonic()


def check(cancel: Event) -> None:
    """Raise Cancelled once `cancel` is set."""
    if cancel.is_set():
        raise Cancelled


@contextmanager
def stoppable(pipe: Any, cancel: Event, compiled: bool = False) -> Iterator[None]:
    """While the block runs, setting `cancel` raises Cancelled before the next layer.

    compiled: the transformer's blocks are compiled whole, so that it stops between its forwards.
    """
    with ExitStack() as stack:
        for module in _layers(pipe, compiled):
            hook = module.register_forward_pre_hook(lambda *_: check(cancel))
            stack.callback(hook.remove)
        yield


def _layers(pipe: Any, compiled: bool) -> Iterator[nn.Module]:
    """Every module without parts of its own but RMS norms, which nothing may hang on where q and k
    are normed and turned by one operator; beside each is a projection."""
    whole = transformers_of(pipe) if compiled else []
    yield from whole
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and all(part is not x for x in whole):
            leaves = (m for m in part.modules() if not any(m.children()))
            yield from (m for m in leaves if not isinstance(m, nn.RMSNorm))
