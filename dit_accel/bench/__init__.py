"""Operators and whole models against dense attention, with an error check."""

from dit_accel.bench.operators import OPS, crossover, run_bench
from dit_accel.bench.shapes import SHAPES, Shape

__all__ = ["OPS", "SHAPES", "Shape", "crossover", "run_bench"]
