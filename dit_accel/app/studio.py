"""The one place that holds a model and runs it: one generation at a time, for all visitors."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from threading import Event, Lock
from typing import Any

import torch

from dit_accel.api import accelerated, restore
from dit_accel.app import replay
from dit_accel.app.ask import Ask, Weights
from dit_accel.app.catalog import card
from dit_accel.app.cost import Pace, Plan, Weight, check_work, tokens_of
from dit_accel.app.loaded import Loaded
from dit_accel.app.preview import Preview, fit_colours
from dit_accel.app.sight import Sight
from dit_accel.app.stop import check, stoppable
from dit_accel.checkpoints.files import find as find_checkpoint
from dit_accel.generation.facts import facts_of
from dit_accel.generation.ledger import Ledger
from dit_accel.generation.loading import (
    EMBEDDED_NAME,
    Defaults,
    find_model,
    load_pipeline,
    pick_device,
)
from dit_accel.generation.options import How
from dit_accel.generation.request import Request, arguments, granularity
from dit_accel.generation.run import Result, generate, warm_up
from dit_accel.generation.trained import Trained
from dit_accel.media.metadata import Facts

Loader = Callable[[str | None], tuple[Any, Defaults]]


@dataclass(frozen=True)
class News:
    """Where a job stands.

    side: "left", "right", or "" before they start.
    phase: what is done now.
    done, total: steps of the phase; total is None where they are not known.
    preview: a data: URI.
    """

    side: str
    phase: str
    done: int = 0
    total: int | None = None
    preview: str | None = None


@dataclass(frozen=True)
class Run:
    """One side when it is done. label: what it ran, in words. report and cells are None for the
    stock pipeline, facts where files carry none. graphs: timed as CUDA graphs, see replay.py;
    plain: the same as Python launched it. fps: of the clip's file."""

    name: str
    how: How
    label: str
    result: Result
    report: dict[str, Any] | None = None
    cells: list[list[float | None]] | None = None
    facts: Facts | None = None
    sight: dict[str, Any] | None = None  # see sight.py
    graphs: bool = False
    plain: Run | None = None
    fps: float = 16


@dataclass(frozen=True)
class Pair:
    """Both sides, and what they ran on. trained: the checkpoint in the pipeline."""

    ask: Ask
    pipe: Any
    defaults: Defaults
    values: dict[str, Any]
    left: Run
    right: Run
    trained: Trained | None = None


Tell = Callable[[News | Run], None]


@dataclass
class Studio:
    """Loads models on demand, keeps one, and runs one job at a time.

    `load` turns a model's name (None: the embedded one) into a pipeline and its defaults; `find`
    refuses, with ValueError, a name that cannot be loaded, before the model in memory is let go.
    """

    load: Loader = load_pipeline
    metadata: bool = True  # clips carry what they were made from
    device: str | None = None
    find: Callable[[str | None], Any] = find_model
    pace: Pace = field(default_factory=Pace)
    _loaded: Loaded | None = field(default=None, init=False)
    _colours: torch.Tensor | None = field(default=None, init=False)
    _warm: set[tuple] = field(default_factory=set, init=False)
    _lock: Any = field(default_factory=Lock, init=False)

    @property
    def where(self) -> torch.device:
        """The device that models run on."""
        return pick_device(self.device)

    def filled(self, ask: Ask) -> Ask:
        """The request with the sizes that the model takes where none are asked for; BadField where
        it is more work than the page allows."""
        loaded = self._held(ask)
        if loaded is not None:
            ask = replace(ask, trained=loaded.config)
        known = ask.filled(loaded.defaults if loaded else card(ask.model).defaults)
        check_work(known, tokens_of(known, self._step(ask)))
        return known

    def plan(self, ask: Ask) -> Plan:
        """What a filled request is expected to take."""
        return self.pace.plan(ask, self._step(ask), self._weight(ask))

    def _held(self, ask: Ask) -> Loaded | None:
        """What this request runs on, if it is in memory."""
        held = self._loaded
        return held if held is not None and held.weights == ask.weights else None

    def _step(self, ask: Ask) -> tuple[int, int]:
        held = self._held(ask)
        return granularity(held.pipe) if held else card(ask.model).step

    def _weight(self, ask: Ask) -> Weight:
        held = self._held(ask)
        return Weight.of(held.pipe) if held else Weight()

    def warm(self) -> None:
        """Load the embedded model and time the machine, so that the first visitor need not wait."""
        with self._lock:
            self.pace.prime(self.where)
            if self._loaded is None:
                self._model((None, ()), lambda item: None)

    def run(self, ask: Ask, cancel: Event, tell: Tell = lambda item: None) -> Pair:
        """Both sides of a request; `tell` hears of progress, and of each side once it is done.

        Raises Cancelled within one layer's time of `cancel` being set, ValueError for a request
        the model cannot serve.
        """
        while not self._lock.acquire(timeout=0.1):
            check(cancel)
        try:
            check(cancel)
            return self._pair(ask, cancel, tell)
        finally:
            self._lock.release()

    def _pair(self, ask: Ask, cancel: Event, tell: Tell) -> Pair:
        loaded = self._model(ask.weights, tell)
        pipe, defaults = loaded.pipe, loaded.defaults
        self.pace.prime(self.where)
        ask = self.filled(ask)
        request = ask.request()
        values = arguments(pipe, defaults, request)
        runs: dict[str, Run] = {}
        graphs = replay.could(ask.left) and replay.could(ask.right)
        for name, how in (("left", ask.left), ("right", ask.right)):
            recorder = _Recorder(name, ask, how, tell, cancel, self._colours, graphs)
            run = recorder.run(pipe, defaults, request, self._cold(ask, how))
            graphs = run.graphs  # both sides or none
            self._warm.add(self._key(ask, how))
            fps = ask.what.fps or defaults.fps
            runs[name] = replace(run, facts=self._facts(ask, loaded, values, how), fps=fps)
            tell(runs[name])
            self._learn(ask, how, runs[name].result)
        left = runs["left"]
        if left.plain is not None and not graphs:
            runs["left"] = replace(left.plain, facts=left.facts, fps=left.fps)
            self._learn(ask, ask.left, left.plain.result)
        return Pair(ask, pipe, defaults, values, **runs, trained=loaded.trained)

    def _facts(self, ask: Ask, loaded: Loaded, values: dict[str, Any], how: How) -> Facts | None:
        """What a side's clip is made from; None where files are to carry nothing."""
        if not self.metadata:
            return None
        model = EMBEDDED_NAME if ask.model is None else ask.model
        told: dict[str, Any] = {"boost": how.boost(), "sampler": ask.what.sampler}
        told |= {"fps": ask.what.fps or loaded.defaults.fps, "trained": loaded.trained}
        config = ask.config(how)
        return facts_of(loaded.pipe, values, ask.what.seed, config, model=model, **told)

    def _learn(self, ask: Ask, how: How, result: Result) -> None:
        """Keep what this run tells: its times, and the colours of the model's latents."""
        times = result.times
        took = (times.denoise, times.total - times.denoise)
        self.pace.learn(ask, how, self._step(ask), self._weight(ask), took)
        if result.latents is not None and self._colours is None:
            height, width = result.frames.shape[1:3]
            self._colours = fit_colours(result.latents, result.frames[0], height / width)

    def _model(self, weights: Weights, tell: Tell) -> Loaded:
        if self._loaded is None or self._loaded.weights != weights:
            name, files = weights
            tell(News("", "loading the model"))
            self.find(name)
            for file in files:
                find_checkpoint(file)
            self._loaded = None  # before the next one is read, so that two never share the memory
            self._warm.clear()
            self._colours = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._loaded = Loaded.of(weights, *self.load(name))
        return self._loaded

    @staticmethod
    def _key(ask: Ask, how: How) -> tuple:
        return how, ask.what.size, ask.what.frames

    def _cold(self, ask: Ask, how: How) -> bool:
        """True until this side has run at this size: the first run pays for set-up."""
        if len(self._warm) >= 256:
            self._warm.clear()
        return self._key(ask, how) not in self._warm


@dataclass
class _Recorder:
    """Runs one side and tells of it."""

    name: str
    ask: Ask
    how: How
    hear: Tell
    cancel: Event
    colours: torch.Tensor | None = None
    graphs: bool = False
    total: int | None = None

    def run(self, pipe: Any, defaults: Defaults, request: Request, cold: bool) -> Run:
        restore(pipe)
        config, ledger, boost = self.ask.config(self.how), Ledger(), self.how.boost()
        with ExitStack() as stack:
            stack.enter_context(stoppable(pipe, self.cancel, boost.compile))
            stack.enter_context(boost.switch_on(pipe))
            if cold:
                self._warm_up(pipe, defaults, request, config)
            handle = stack.enter_context(accelerated(pipe, config)) if config else None
            sight = Sight(handle, request.steps or 0) if handle else None
            ratio = (request.height or 1) / (request.width or 1)
            preview = Preview(pipe, ratio, self.colours)

            def on_step(done: int, latents: torch.Tensor | None) -> None:
                if handle:
                    ledger.read(handle.report())
                self.tell("denoise", done, self.total, preview.draw(done, latents))

            result = generate(pipe, defaults, request, self.tell, on_step)
            report = handle.report().to_dict() if handle else None
            seen = sight.to_dict() if sight else None
        cells = ledger.cells if handle else None
        words, timed = self.ask.label(self.how), None
        plain = Run(self.name, self.how, words, result, report, cells, sight=seen)
        if self.graphs and replay.waits(pipe, result):
            timed = replay.replayed(pipe, defaults, request, config, boost, self.cancel, self.tell)
        if timed is None:
            return plain
        words += f", {replay.WORDS}"
        return replace(plain, label=words, result=timed, graphs=True, plain=plain)

    def _warm_up(self, pipe: Any, defaults: Defaults, request: Request, config: Any) -> None:
        self.tell("warm-up")
        with ExitStack() as stack:
            if config:
                now = replace(config, schedule=replace(config.schedule, warmup=0))
                stack.enter_context(accelerated(pipe, now))
            warm_up(pipe, defaults, request)

    def tell(
        self, phase: str, done: int = 0, total: int | None = None, preview: str | None = None
    ) -> None:
        check(self.cancel)
        self.total = total
        self.hear(News(self.name, phase, done, total, preview))
