"""A transformer's `cache_context`, in which pipelines announce the step and the guidance pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from dit_accel.forward.clock import Clock

_NAME = "cache_context"


class CacheContext:
    """One that a clock follows.

    before: what had been set on the transformer itself, or None.
    """

    def __init__(
        self,
        transformer: nn.Module,
        clock: Clock,
        before: Callable[..., AbstractContextManager] | None,
    ) -> None:
        self.transformer, self.clock, self.before = transformer, clock, before

    @contextmanager
    def __call__(self, name: str, **fields: object) -> Iterator[object]:
        kind: Any = type(self.transformer)
        enter = self.before or kind.cache_context.__get__(self.transformer)
        with self.clock.context(name, fields), enter(name, **fields) as context:
            yield context


def follow(transformer: nn.Module, clock: Clock) -> None:
    """Let a clock hear what is announced, where anything is."""
    if hasattr(transformer, _NAME):
        before = vars(transformer).get(_NAME)
        vars(transformer)[_NAME] = CacheContext(transformer, clock, before)


def leave(transformer: nn.Module, clock: Clock) -> None:
    """Undo `follow`, whatever came since."""
    own, above = vars(transformer), None
    found = own.get(_NAME)
    while isinstance(found, CacheContext) and found.clock is not clock:
        above, found = found, found.before
    if not isinstance(found, CacheContext):
        return
    if above is not None:
        above.before = found.before
    elif found.before is None:
        del own[_NAME]
    else:
        own[_NAME] = found.before
