"""What tests and benchmarks compare with: how close is close; an interpreter that rounds."""

from dit_accel.testing.closeness import WIDER, assert_close, references
from dit_accel.testing.interpreter import repair_interpreter

__all__ = ["WIDER", "assert_close", "references", "repair_interpreter"]
