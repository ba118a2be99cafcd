"""First-Block-Cache of diffusers, which decides at the first block whether a forward is skipped, as
CUDA graphs need it: its state, and the one thing that it asks the GPU."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dit_accel.pruning.step_cache import LEADERS
from dit_accel.runtime.recorder import Ask

LEADER = LEADERS["FirstBlockCacheConfig"]
HOOKS = {LEADER, "fbc_block_hook"}
_ASKS = "_should_compute_remaining_blocks"


class Unseen(Exception):
    """A forward that is being recorded goes a way that it never ran."""


def unkept(cache: StepCache | None, engine: object) -> str:
    """Why the state of a step cache is not kept from forward to forward, or ""."""
    if cache is None or engine is not None:
        return ""
    return 'a step cache is enabled on a pipeline that is not accelerated ("dense" would do)'


class StepCache:
    """The step cache that is enabled on a transformer. leader: its hook of the first block."""

    def __init__(self, leader: Any) -> None:
        self.leader, self.states = leader, leader.state_manager

    @classmethod
    def of(cls, modules: list[nn.Module]) -> StepCache | None:
        """By what hangs on these modules."""
        for own in map(vars, modules):
            hooks = getattr(own.get("_diffusers_hook"), "hooks", {})
            if LEADER in hooks:
                return cls(hooks[LEADER])
        return None

    @property
    def fresh(self) -> bool:
        """Whether no forward of this generation came by."""
        return not self.states._state_cache

    @property
    def computes(self) -> bool:
        """Whether the last forward was computed whole, of the pass at hand."""
        return self.states.get_state().should_compute

    def decide(self, change: float) -> bool:
        """Whether a forward is computed whole whose first block changed so much."""
        return change > self.leader.threshold

    def state(self) -> dict[str, dict[str, object]]:
        """What is kept of each pass."""
        return {name: dict(vars(state)) for name, state in self.states._state_cache.items()}

    def restore(self, state: dict[str, dict[str, object]]) -> None:
        """As it was."""
        self.states._state_cache.clear()
        for name, own in state.items():
            self.states._state_cache[name] = new = self.states._state_cls()
            vars(new).update(own)

    @contextmanager
    def asking(self, ask: Ask, seen: Set[object]) -> Iterator[None]:
        """A block in which a forward is recorded: how much its first block changed is asked of what
        records. Unseen where the answer is not among `seen`."""

        def decide(change: float) -> bool:
            if (computes := self.decide(change)) not in seen:
                raise Unseen
            return computes

        def asks(residual: Tensor) -> bool:
            last = self.states.get_state().head_block_residual
            if last is None:
                return True
            return ask((residual - last).abs().mean() / last.abs().mean(), decide)

        setattr(self.leader, _ASKS, asks)
        try:
            yield
        finally:
            vars(self.leader).pop(_ASKS)
