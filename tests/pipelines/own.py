"""What one pipeline wants beside what all are made of and given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import nn

# a ramp: of one colour, some pipelines would divide by its deviation
PICTURE = Image.linear_gradient("L").convert("RGB").resize((128, 128))
CLIP = [PICTURE] * 9


@dataclass(frozen=True)
class Own:
    """The wants of one pipeline.

    config: of its transformer. controlnet: of its control net, beside the transformer's.
    parts: the transformer → its other parts. given: of its call; without: what its call is not
    given. sets: what is set on the pipeline, or on one in it: a method that would encode text, a
    default size.
    """

    config: dict[str, Any] = field(default_factory=dict)
    controlnet: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[nn.Module], dict[str, Any]] = lambda transformer: {}
    given: Callable[[], dict[str, Any]] = dict
    without: tuple[str, ...] = ()
    sets: dict[str, Any] = field(default_factory=dict)


def told(*shape: int, seed: int = 0) -> torch.Tensor:
    """What a stand-in for a text encoder says: the same numbers whenever it is asked."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
