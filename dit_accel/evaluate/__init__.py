"""Prompts × seeds × configurations against dense clips of the same seed."""

from dit_accel.evaluate.rows import Row
from dit_accel.evaluate.run import Budget, evaluate
from dit_accel.evaluate.study import Study
from dit_accel.inputs.prompts import read_prompts

__all__ = ["Budget", "Row", "Study", "evaluate", "read_prompts"]
