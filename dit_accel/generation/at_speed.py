"""A pipeline accelerated by a profile, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel import api
from dit_accel.generation.options import How

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from dit_accel.runtime.report import Report


class AtSpeed:
    """What `at_speed` returns: the way to the report and back to the pipeline as it was."""

    def __init__(self, pipe: DiffusionPipeline, how: How) -> None:
        config, self._pipe, self._boost = how.config(), pipe, how.boost()
        self._beside = self._boost.switch_on(pipe)
        try:
            self.handle = api.accelerate(pipe, config)
        except BaseException:
            self._beside.close()
            raise
        vars(pipe)[api.SPEED] = self

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of the pipeline has none."""
        return type(None), ()

    def report(self) -> Report:
        """What ran since."""
        return self.handle.report()

    def restore(self) -> None:
        """Give the pipeline back exactly as it was. Doing it twice does nothing."""
        self.handle.restore()
        self._beside.close()
        if vars(self._pipe).get(api.SPEED) is self:
            del vars(self._pipe)[api.SPEED]

    def replaced(self, how: How) -> AtSpeed:
        """Another profile in the place of this one, which stays where that is refused."""
        self._beside.close()
        try:
            return AtSpeed(self._pipe, how)
        except BaseException:
            self._beside = self._boost.switch_on(self._pipe)
            raise


def at_speed(pipe: DiffusionPipeline, name: str, **given: Any) -> AtSpeed:
    """Accelerate a pipeline by a profile: "conservative", "balanced" or "fast".

    given: options of the command line that replace the profile's, such as keep=0.2, dense="auto",
    quantize="int8". A pipeline that is at a speed is given the other one; `restore`, that of what
    is returned or `dit_accel.restore(pipe)`, takes all of it away. Raises ValueError for an unknown
    profile, and where the pipeline cannot have a step cache (Latte) or has one; it is then as
    before.
    """
    how, before = How(speed=name, **given), vars(pipe).get(api.SPEED)
    return AtSpeed(pipe, how) if before is None else before.replaced(how)
