"""What an accelerated pipeline did: by layer, by step, by reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.machine import Stopwatch


@dataclass
class LayerBook:
    """What one layer (`number` in its transformer) did; `kept` sums over its sparse calls."""

    name: str
    number: int
    sparse: int = 0
    dense: int = 0
    kept: float | torch.Tensor = 0.0


@dataclass
class StepBook:
    """One transformer forward: where it stood, what its layers did, how long it took."""

    step: int
    passname: str
    watch: Stopwatch
    sparse: int = 0
    dense: int = 0
    kept: float | torch.Tensor = 0.0
    tokens: float = 1.0
