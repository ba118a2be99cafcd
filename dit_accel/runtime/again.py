"""Gradient checkpointing: what of a forward can be run again in its backward pass."""

from __future__ import annotations

import torch
from torch import nn

from dit_accel.config import AccelConfig
from dit_accel.runtime.books import Books


def check(config: AccelConfig) -> None:
    """RuntimeError where a second run of a call would not be the same as the first."""
    if not _keeps_state(config):
        return
    pruned = config.prune is not None
    what = "token pruning" if pruned else config.method.name
    instead = "prune=None" if pruned else "a method without a state, such as sla"
    raise RuntimeError(
        f"{what} keeps a state from step to step, and gradient checkpointing would run through it "
        f"twice: call disable_gradient_checkpointing(), or take {instead}"
    )


def books(config: AccelConfig, real: Books) -> Books:
    """Books for what is run again: it was counted before. RuntimeError as `check`."""
    check(config)
    return real.blank()


def check_transformer(transformer: nn.Module, config: AccelConfig) -> None:
    """The same before a forward that diffusers is about to checkpoint."""
    if not torch.is_grad_enabled() or not _keeps_state(config):
        return  # to ask the transformer is to ask all its modules: milliseconds
    checkpointed = getattr(transformer, "is_gradient_checkpointing", False)
    if checkpointed and any(p.requires_grad for p in transformer.parameters()):
        check(config)


def _keeps_state(config: AccelConfig) -> bool:
    return config.prune is not None or config.method.stateful
