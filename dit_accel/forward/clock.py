"""Where a generation stands: step, guidance pass, token grid, and when a new one starts.

Read once per transformer forward, never per layer. One clock serves all transformers of a pipeline
(Wan 2.2 has two experts over one run of steps), and all pipelines of its transformers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.forward.caller import Caller, caller
from dit_accel.pipelines.base import NOWHERE, Geometry


class Clock:
    """Follows the running pipeline's scheduler and cache context; `tick` moves it at each forward.

    pipe: whose steps count where the caller of a forward is no pipeline. scheduler: its last one,
    which is followed when the pipeline is gone.
    """

    def __init__(self, pipe: object = None, scheduler: object = None) -> None:
        self.generation = 0
        self.step = -1
        self.steps: int | None = None
        self.passname = ""
        self.geometry = NOWHERE
        self._first, self._scheduler = weakly(pipe), getattr(pipe, "scheduler", scheduler)
        self._pipe = self._first
        self._context: tuple[str, dict[str, Any]] | None = None
        self._seen: list[str] = []
        self._timesteps: object = None
        self._inference = False
        self._stood = False  # at the last forward
        self._begin: int | None = None  # the scheduler's index at the first step, where it was seen

    def __reduce__(self) -> tuple[object, ...]:
        return Clock, (None, self._scheduler)  # a copy starts anew

    @contextmanager
    def context(self, name: str, fields: dict[str, object]) -> Iterator[None]:
        """Remember the pipeline's cache context while one pass runs."""
        before, self._context = self._context, (name, fields)
        try:
            yield
        finally:
            self._context = before

    def tick(
        self,
        geometry: Geometry,
        timestep: Tensor | float | None = None,
        model: nn.Module | None = None,
    ) -> bool:
        """Move to the forward that starts now; True when it opens a new generation or shape.

        timestep: what the transformer is given; read only if the scheduler does not count steps.
        model: the transformer, by which the pipeline that runs is found.
        """
        runs = Caller() if model is None else caller(model, self._first())
        runs = runs if runs.pipe is not None else Caller(self._first())
        self._pipe = weakly(runs.pipe)
        self._scheduler = getattr(runs.pipe, "scheduler", self._scheduler)
        step, self.steps = self._read(timestep, runs)
        name = self._context[0] if self._context else None
        timesteps = getattr(self._scheduler, "timesteps", None)
        if self._stands() and timesteps is self._timesteps and geometry.grid == self.geometry.grid:
            step = (self.step + (name in self._seen)) % (self.steps or 1)
        fresh = timesteps is not self._timesteps or step < self.step
        fresh = fresh or geometry.grid != self.geometry.grid or (step == 0 and name in self._seen)
        # what inference mode made cannot be trained with
        fresh = fresh or self._inference != torch.is_inference_mode_enabled()
        if fresh:
            self.generation += 1
        if fresh or step != self.step:
            self._seen = []
        self.passname = name or f"pass{len(self._seen)}"
        self._seen.append(self.passname)
        self.step, self.geometry, self._timesteps = step, geometry, timesteps
        self._inference = torch.is_inference_mode_enabled()
        self._stood = self._stands()
        return fresh

    @property
    def passes(self) -> int:
        """Guidance passes of a step, as far as the pipeline lets it be foreseen."""
        apart = self._context is not None and "uncond" not in self._context[0]
        return 2 if apart and getattr(self._pipe(), "do_classifier_free_guidance", False) else 1

    def _stands(self) -> bool:
        """Has the scheduler made no step yet? That of SkyReels V2's diffusion forcing never does:
        each frame has a copy of it, and passes that come again tell the steps."""
        told = self._context is not None and self._context[1].get("step_index") is not None
        return not told and getattr(self._scheduler, "step_index", 0) is None

    def _read(self, timestep: Tensor | float | None, runs: Caller) -> tuple[int, int | None]:
        """(step, number of steps) from the cache context, else from the scheduler."""
        fields, scheduler = self._context[1] if self._context else {}, self._scheduler
        begin = getattr(scheduler, "begin_index", None) or 0
        timesteps = getattr(scheduler, "timesteps", None)
        index = getattr(scheduler, "step_index", None)
        n = 0 if timesteps is None else len(timesteps)
        said = getattr(runs.pipe, "_num_timesteps", n) if runs.itself else n
        begin = max(begin, n - said)  # image and video to video run the last part of the timesteps
        if timesteps is not self._timesteps or index is None:
            self._begin = None
        elif self._stood:
            self._begin = index - 1
        begin = begin if self._begin is None else self._begin
        rest = said if runs.itself and self._stands() else min(n - begin, said)
        steps = None if timesteps is None else rest
        if fields.get("step_index") is not None:
            return int(fields["step_index"]), fields.get("num_inference_steps") or steps
        if timesteps is not None and timestep is not None and not hasattr(scheduler, "step_index"):
            index = _nearest(timesteps, timestep)  # DDIM, DDPM, CogVideoX: a device synchronisation
        step = 0 if index is None else max(0, index - begin)
        if steps is not None and step >= steps and not runs.itself:
            return 0, None  # the scheduler's run is over: this forward is none of its steps
        return step, steps


def weakly(pipe: object) -> Callable[[], object]:
    """A weak reference to any object; a strong one where its kind knows none."""
    try:
        return weakref.ref(pipe)
    except TypeError:  # None, and classes with slots
        return lambda: pipe


def _nearest(timesteps: torch.Tensor, timestep: torch.Tensor | float) -> int:
    """The step of a run of `timesteps` whose forward was given `timestep` (one per sample)."""
    now = torch.as_tensor(timestep, dtype=torch.float32).flatten()[0].to(timesteps.device)
    return int((timesteps - now).abs().argmin())
