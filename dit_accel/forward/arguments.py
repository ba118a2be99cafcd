"""What a forward is called with, by name."""

from __future__ import annotations

import functools
import inspect
from typing import Any


def given(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a module's forward, those of a hook."""
    return signature(type(module).forward).bind_partial(module, *args, **kwargs).arguments


@functools.cache
def signature(forward: Any) -> inspect.Signature:
    """That of a class's forward, looked up once."""
    return inspect.signature(forward)
