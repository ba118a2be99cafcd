"""Stopping a pipeline that is running: an exception at the next block of any of its models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event
from typing import Any

from torch import nn


class Cancelled(Exception):
    """The visitor pressed cancel, left the page or asked for something else."""


def check(cancel: Event) -> None:
    """Raise Cancelled once `cancel` is set."""
    if cancel.is_set():
        raise Cancelled


@contextmanager
def stoppable(pipe: Any, cancel: Event) -> Iterator[None]:
    """While the block runs, setting `cancel` raises Cancelled within one layer's time."""
    with ExitStack() as stack:
        for block in _blocks(pipe):
            hook = block.register_forward_pre_hook(lambda *_: check(cancel))
            stack.callback(hook.remove)
        yield


def _blocks(pipe: Any) -> Iterator[nn.Module]:
    """The members of every list of layers in the pipeline's models."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            lists = (m for m in part.modules() if isinstance(m, nn.ModuleList))
            yield from (block for group in lists for block in group)
