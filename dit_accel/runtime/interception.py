"""Guidance that acts inside of attention: modes that intercept scaled_dot_product_attention.

Perturbed-attention guidance (arXiv 2403.17377) is one in diffusers: in the pass that it perturbs,
the values take the place of the attention. A method computes no such call, so it cannot be met.
"""

from __future__ import annotations

import torch
from torch.utils._device import DeviceContext


def interceptor() -> str:
    """The name of the innermost TorchFunctionMode that is active, or "".

    `torch.device(...)` as a context is one, too, and leaves attention alone.
    """
    for i in reversed(range(torch._C._len_torch_function_stack())):
        kind = type(torch._C._get_function_stack_at(i))
        if kind is not DeviceContext:
            return kind.__name__
    return ""
