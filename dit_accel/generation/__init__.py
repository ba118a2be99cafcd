"""Load a stock pipeline, check a request, run it, hold two runs against each other.

Names resolve on first use: what describes options needs none of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.generation.boost import Boost
    from dit_accel.generation.comparison import Comparison, compare
    from dit_accel.generation.loading import Defaults, load_pipeline
    from dit_accel.generation.request import Request, arguments
    from dit_accel.generation.run import Result, Times, generate, warm_up

_HOME = {
    "Boost": "boost",
    "Comparison": "comparison",
    "Defaults": "loading",
    "Request": "request",
    "Result": "run",
    "Times": "run",
    "arguments": "request",
    "compare": "comparison",
    "generate": "run",
    "load_pipeline": "loading",
    "warm_up": "run",
}

__all__ = [
    "Boost",
    "Comparison",
    "Defaults",
    "Request",
    "Result",
    "Times",
    "arguments",
    "compare",
    "generate",
    "load_pipeline",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"dit_accel.generation.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dit_accel.generation' has no attribute {name!r}")
