"""How long the blocks of a transformer wait for their weights.

With diffusers' streams a block's hook waits until its weights have come, and the compute stream is
drained when the block before it leaves. So the time between a block's call and its first own
line is time in which the GPU has nothing to compute.
"""

from __future__ import annotations

import time
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

_NAME = "dit_accel_arrival"


class Waits:
    """Seconds that the modules of one transformer waited."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def called(self, module: nn.Module, args: object) -> None:
        """Forward pre-hook of a module, before its weights are asked for."""
        self._since = time.perf_counter()

    def arrived(self) -> None:
        """Its weights are there."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None


class Arrival(ModelHook):
    """The innermost hook of a module, which runs when all others have done their work."""

    _is_stateful = False

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.waits.arrived()
        return args, kwargs


def watch(transformer: nn.Module) -> None:
    """Count the waits of a transformer and of its blocks; before the hooks that move weights."""
    waits = Waits()
    blocks = [m for m in transformer.children() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    for module in (transformer, *(block for some in blocks for block in some)):
        module.register_forward_pre_hook(waits.called)
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Arrival(waits), _NAME)


def waits_of(transformer: nn.Module) -> Waits | None:
    """What `watch` counts; None where it was not called."""
    hooks = getattr(transformer, "_diffusers_hook", None)
    hook = None if hooks is None else hooks.get_hook(_NAME)
    return hook.waits if isinstance(hook, Arrival) else None
