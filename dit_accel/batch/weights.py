"""What changes a pipeline's weights for a job: a LoRA, linear layers in eight bits."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from dit_accel.generation.boost import STOCK, Boost

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class Weights:
    """A pipeline whose weights are those of the job at hand, and stay for jobs that want the same.

    pipe: the pipeline; stock after `close`.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe, self._fits, self._on = pipe, STOCK, ExitStack()

    def fit(self, boost: Boost) -> None:
        """Put on the LoRA and the number format of `boost`; of what else it says nothing counts.

        Raises ValueError, with stock weights, where the pipeline cannot have them.
        """
        wanted = Boost(lora=boost.lora, quantize=boost.quantize)
        if wanted == self._fits:
            return
        self.close()
        wanted.check(self.pipe)
        with ExitStack() as stack:
            stack.enter_context(wanted.adapted(self.pipe))
            stack.enter_context(wanted.quantized(self.pipe))
            self._on = stack.pop_all()
        self._fits = wanted

    def close(self) -> None:
        """Give the pipeline back with its own weights."""
        self._on.close()
        self._fits = STOCK
