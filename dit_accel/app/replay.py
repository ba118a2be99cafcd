"""A side once more as CUDA graphs, where Python and not the GPU would be timed.

A small model's step is over on a GPU sooner than Python has launched it: what is kept less then
saves nothing. Its first run draws and is watched, three more do not take longer than a glance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from threading import Event
from typing import Any

from dit_accel.api import NotRecorded, accelerated
from dit_accel.app.stop import stoppable
from dit_accel.config import AccelConfig
from dit_accel.generation.boost import Boost
from dit_accel.generation.loading import Defaults
from dit_accel.generation.options import How
from dit_accel.generation.request import Request
from dit_accel.generation.run import Result, generate, is_short, rehearse
from dit_accel.pipelines.denoisers import transformers_of

_LOG = logging.getLogger(__name__)
WORDS = "CUDA graphs"


def could(how: How) -> bool:
    """Whether what a side runs can be replayed."""
    return how.prune is None and how.quantize is None and how.lora is None


def waits(pipe: Any, result: Result) -> bool:
    """Whether the steps of a run on a GPU were so short that Python may be most of them."""
    on_gpu = all(x.is_cuda for model in transformers_of(pipe) for x in model.parameters())
    return on_gpu and is_short(result.times.steps)


def replayed(
    pipe: Any,
    defaults: Defaults,
    request: Request,
    config: AccelConfig | None,
    boost: Boost,
    cancel: Event,
    tell: Callable[..., None],
) -> Result | None:
    """The same clip by the same kernels, launched at once; None for a model whose forwards cannot
    be recorded, which is logged. Raises Cancelled between two forwards."""
    try:
        with ExitStack() as stack:
            stack.enter_context(stoppable(pipe, cancel, compiled=True))
            stack.enter_context(replace(boost, graphs=True).switch_on(pipe))
            if config is not None:
                stack.enter_context(accelerated(pipe, config))
            rehearse(pipe, defaults, request, tell)
            return generate(pipe, defaults, request, tell)
    except NotRecorded as error:
        _LOG.info(f"timed as launched by Python: {error}")
        return None
