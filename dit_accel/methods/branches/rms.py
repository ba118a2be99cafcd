"""Linear attention that is normalised instead of divided: TransNormer's NormAttention (arXiv
2210.10340), in Lightning Attention, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_accel.methods.branches.base import Branch


@dataclass(frozen=True)
class RMS(Branch):
    """O_lin,i = x_i / rms(x_i) over the head dimension, x_i the weighted sum without its divisor.

    No tensors of its own: W brings the scale. Equal to the plain branch where that one's output has
    a root mean square of 1.
    """

    name: ClassVar[str] = "rms"
    description: ClassVar[str] = "the linear branch over its root mean square, no divisor"
    paper: ClassVar[str] = "arXiv 2210.10340 (TransNormer), 2405.17381 (Lightning Attention)"
    rms: ClassVar[bool] = True
