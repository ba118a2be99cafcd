"""A pipeline accelerated by a profile, in one call."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dit_accel import api
from dit_accel.generation.options import How

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from dit_accel.api import Handle
    from dit_accel.runtime.report import Report


class AtSpeed:
    """What `at_speed` returns: the way to the report and back to the pipeline as it was."""

    def __init__(self, handle: Handle, beside: ExitStack) -> None:
        self.handle, self._beside = handle, beside

    def report(self) -> Report:
        """What ran since."""
        return self.handle.report()

    def restore(self) -> None:
        """Give the pipeline back exactly as it was. Doing it twice does nothing."""
        self.handle.restore()
        self._beside.close()


def at_speed(pipe: DiffusionPipeline, name: str, **given: Any) -> AtSpeed:
    """Accelerate a pipeline by a profile: "conservative", "balanced" or "fast".

    given: options of the command line that replace the profile's, such as keep=0.2, dense="auto",
    quantize="int8". Raises ValueError for an unknown profile, and where the pipeline cannot have a
    step cache (Latte) or has one; it is then as before.
    """
    how = How(speed=name, **given)
    config, beside = how.config(), how.boost().switch_on(pipe)
    try:
        return AtSpeed(api.accelerate(pipe, config), beside)
    except BaseException:
        beside.close()
        raise
