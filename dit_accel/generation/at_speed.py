"""A pipeline accelerated by a profile, in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dit_accel import api
from dit_accel.generation.options import How
from dit_accel.pipelines.denoisers import transformers_of

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
        self._mark()

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of the pipeline has none."""
        return type(None), ()

    def report(self) -> Report:
        """What ran since."""
        return self.handle.report()

    def restore(self) -> None:
        """Give the pipeline back exactly as it was. Doing it twice does nothing."""
        self.handle.restore()
        self.end()

    def end(self) -> None:
        """Another method has come: what stood beside this one goes."""
        self._beside.close()
        for transformer in self._marked:
            if vars(transformer).get(api.SPEED) is self:
                del vars(transformer)[api.SPEED]

    def resume(self) -> None:
        """The method is back: so is what stands beside it."""
        self._beside = self._boost.switch_on(self._pipe)
        self._mark()

    def _mark(self) -> None:
        self._marked = transformers_of(self._pipe)
        for transformer in self._marked:
            vars(transformer)[api.SPEED] = self

    def replaced(self, how: How) -> AtSpeed:
        """Another profile in the place of this one, which stays where that is refused."""
        self._beside.close()
        try:
            return AtSpeed(self._pipe, how)
        except BaseException:
            self.resume()
            raise


def at_speed(pipe: DiffusionPipeline, name: str, **given: Any) -> AtSpeed:
    """Accelerate a pipeline by a profile: "conservative", "balanced" or "fast".

    given: options of the command line that replace the profile's, such as keep=0.2, dense="auto",
    quantize="int8". A pipeline that is at a speed is given the other one; `restore`, that of what
    is returned or `dit_accel.restore(pipe)`, takes all of it away. Raises ValueError for an unknown
    profile, and where the pipeline cannot have a step cache (Latte) or has one; it is then as
    before.
    """
    how, before = How(speed=name, **given), api.speed_of(pipe)
    return before.replaced(how) if isinstance(before, AtSpeed) else AtSpeed(pipe, how)
