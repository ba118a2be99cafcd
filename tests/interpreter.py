"""Triton's interpreter, where no GPU is: kernels run on the CPU, in float32 and float16."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

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
