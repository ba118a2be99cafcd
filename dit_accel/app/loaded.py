"""What the studio holds in memory: a pipeline, and the checkpoint in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_accel.app.ask import Weights
from dit_accel.checkpoints import load_checkpoint
from dit_accel.config import AccelConfig
from dit_accel.generation.loading import Defaults
from dit_accel.generation.trained import Trained
from dit_accel.methods.dense import Dense
from dit_accel.schedule import Schedule


@dataclass(frozen=True)
class Loaded:
    """What is in memory. config: what its checkpoint was trained for, None without one."""

    weights: Weights
    pipe: Any
    defaults: Defaults
    trained: Trained | None = None
    config: AccelConfig | None = None

    @classmethod
    def of(cls, weights: Weights, pipe: Any, defaults: Defaults) -> Loaded:
        """A pipeline with the checkpoint, if there is one, in it; ValueError for what does not fit
        the model."""
        files = weights[1]
        if not files:
            return cls(weights, pipe, defaults)
        found = load_checkpoint(pipe, *files, attention=False)
        trained = Trained(files, found.family, found.sampler, found.config)
        config = found.config or AccelConfig(Dense(), Schedule(warmup=0))
        return cls(weights, pipe, defaults.taking(found.arguments), trained, config)
