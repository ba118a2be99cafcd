"""Load a stock pipeline, check a request, run it, hold two runs against each other."""

from dit_accel.generation.boost import Boost
from dit_accel.generation.comparison import Comparison, compare
from dit_accel.generation.loading import Defaults, load_pipeline
from dit_accel.generation.request import Request, arguments
from dit_accel.generation.run import Result, Times, generate, warm_up

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
