"""Where a diffusers pipeline holds its denoising transformers: one, or two experts."""

from __future__ import annotations

from typing import Any

from torch import nn

SLOTS = ("transformer", "transformer_2")


def transformers_of(pipe: Any) -> list[nn.Module]:
    """The pipeline's denoising transformers; empty for a pipeline without one."""
    found = (getattr(pipe, slot, None) for slot in SLOTS)
    return [module for module in found if isinstance(module, nn.Module)]
