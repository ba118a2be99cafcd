"""Triton's interpreter, where no GPU is: kernels run on the CPU, in float32 and float16."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def interpreted() -> Iterator[None]:
    """What triton.jit decorates inside is interpreted, for good."""
    if torch.cuda.is_available():
        yield
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]


def quick() -> None:
    """Let a kernel's language be patched once a launch, not again at each call of a function in it,
    which finds it patched and takes a third of the interpreter's time."""
    from triton import language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang = _once(interpreter._patch_lang, (tl, tl.core))


def _once(patch: Callable[[Any], Any], langs: tuple) -> Callable[[Any], Any]:
    done: list[Any] = []  # of the launch that runs

    def patched(fn: Any) -> Any:
        used = [lang for lang in langs if any(lang is x for x in fn.__globals__.values())]
        if done and all(lang in done for lang in used):
            return None  # a function in a kernel: nobody asks for it
        scope, first = patch(fn), not done
        done.extend(used)
        if first:
            restore = scope.restore

            def end() -> None:
                done.clear()
                restore()

            scope.restore = end
        return scope

    return patched
