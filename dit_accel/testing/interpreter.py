"""Triton's interpreter, mended where it differs from a GPU."""

from __future__ import annotations

import torch


def repair_interpreter() -> None:
    """Make Triton's interpreter round float32 to e4m3 as a GPU does.

    It loses the carry where rounding reaches the next power of two: 127.0 becomes 64.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: object, source: object, target: object, mode: object) -> object:
        if source != tl.float32 or target != tl.float8e4nv:
            return convert(data, source, target, mode)
        return torch.tensor(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = rounded
