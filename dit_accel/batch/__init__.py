"""Many clips: a queue that survives, worker processes, a gallery. See docs/scale/batch.md.

Nothing is imported before it is asked for: the command line reads its options from here.
"""

from importlib import import_module
from typing import Any

_HOME = {"Job": "jobs", "Settings": "worker", "Summary": "summary", "run": "campaign"}

__all__ = ["Job", "Settings", "Summary", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
