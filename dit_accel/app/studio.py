"""The one place that holds a model and runs it: one generation at a time, for all visitors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import torch

from dit_accel.api import accelerated, restore
from dit_accel.app.ask import Ask, Side
from dit_accel.app.ledger import Ledger
from dit_accel.app.preview import Preview, fit_colours
from dit_accel.app.stop import check, stoppable
from dit_accel.generation.facts import facts_of
from dit_accel.generation.loading import EMBEDDED_NAME, Defaults, load_pipeline
from dit_accel.generation.request import Request, arguments
from dit_accel.generation.run import Result, generate, warm_up
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
    """One side when it is done. report and cells are None for the stock pipeline, facts where files
    carry none."""

    name: str
    side: Side
    result: Result
    report: dict[str, Any] | None = None
    cells: list[list[float | None]] | None = None
    facts: Facts | None = None


@dataclass(frozen=True)
class Pair:
    """Both sides, and what they ran on."""

    ask: Ask
    pipe: Any
    defaults: Defaults
    values: dict[str, Any]
    left: Run
    right: Run


@dataclass
class Studio:
    """Loads models on demand, keeps one, and runs jobs one after the other.

    `load` turns a model's name (None: the embedded one) into a pipeline and its defaults.
    """

    load: Loader = load_pipeline
    metadata: bool = True  # clips carry what they were made from
    _name: str | None = field(default=None, init=False)
    _loaded: tuple[Any, Defaults] | None = field(default=None, init=False)
    _colours: torch.Tensor | None = field(default=None, init=False)
    _warm: set[tuple] = field(default_factory=set, init=False)
    _lock: Any = field(default_factory=Lock, init=False)

    @property
    def fps(self) -> float:
        """Frames per second of the loaded model's clips."""
        return self._loaded[1].fps if self._loaded else Defaults.fps

    def run(self, ask: Ask, cancel: Event) -> Iterator[News | Run | Pair]:
        """Yield progress, each side as it is done, and at the end the pair.

        Raises Cancelled within one layer's time of `cancel` being set, ValueError for a request
        the model cannot serve. Leaving the iterator early cancels the job.
        """
        news: SimpleQueue = SimpleQueue()
        worker = Thread(target=self._work, args=(ask, cancel, news.put), daemon=True)
        worker.start()
        try:
            while (item := news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            cancel.set()
            worker.join()

    def _work(self, ask: Ask, cancel: Event, put: Callable[[Any], None]) -> None:
        try:
            while not self._lock.acquire(timeout=0.1):
                check(cancel)
            try:
                put(self._pair(ask, cancel, put))
            finally:
                self._lock.release()
        except BaseException as error:  # handed to the thread that iterates
            put(error)
        finally:
            put(None)

    def _pair(self, ask: Ask, cancel: Event, put: Callable[[Any], None]) -> Pair:
        check(cancel)
        pipe, defaults = self._model(ask.model, put)
        request = ask.request(defaults)
        values = arguments(pipe, defaults, request)
        runs = {}
        for name, side in (("left", ask.left), ("right", ask.right)):
            recorder = _Recorder(name, side, put, cancel, self._colours)
            run = recorder.run(pipe, defaults, request, self._cold(ask, side))
            runs[name] = replace(run, facts=self._facts(ask, pipe, values, side))
            put(runs[name])
            self._learn(runs[name].result)
        return Pair(ask, pipe, defaults, values, **runs)

    def _facts(self, ask: Ask, pipe: Any, values: dict[str, Any], side: Side) -> Facts | None:
        """What a side's clip is made from; None where files are to carry nothing."""
        if not self.metadata:
            return None
        model = EMBEDDED_NAME if ask.model is None else ask.model
        return facts_of(pipe, values, ask.seed, side.config(), model=model, fps=self.fps)

    def _learn(self, result: Result) -> None:
        """Keep the colours of this model's latents for the previews to come."""
        if result.latents is not None and self._colours is None:
            height, width = result.frames.shape[1:3]
            self._colours = fit_colours(result.latents, result.frames[0], height / width)

    def _model(self, name: str | None, put: Callable[[Any], None]) -> tuple[Any, Defaults]:
        if self._loaded is None or name != self._name:
            put(News("", "loading the model"))
            self._loaded = None  # before the next one is read, so that two never share the memory
            self._warm.clear()
            self._colours = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._loaded, self._name = self.load(name), name
        return self._loaded

    def _cold(self, ask: Ask, side: Side) -> bool:
        """True the first time this side runs at this size: it then pays for set-up."""
        key = (side, ask.width, ask.height, ask.frames)
        known = key in self._warm
        if len(self._warm) >= 256:
            self._warm.clear()
        self._warm.add(key)
        return not known


@dataclass
class _Recorder:
    """Runs one side and tells of it."""

    name: str
    side: Side
    put: Callable[[Any], None]
    cancel: Event
    colours: torch.Tensor | None = None
    total: int | None = None

    def run(self, pipe: Any, defaults: Defaults, request: Request, cold: bool) -> Run:
        restore(pipe)
        config, ledger = self.side.config(), Ledger()
        with ExitStack() as stack:
            stack.enter_context(stoppable(pipe, self.cancel))
            if cold:
                self._warm_up(pipe, defaults, request, config)
            handle = stack.enter_context(accelerated(pipe, config)) if config else None
            ratio = (request.height or 1) / (request.width or 1)
            preview = Preview(pipe, ratio, self.colours)

            def on_step(done: int, latents: torch.Tensor | None) -> None:
                if handle:
                    ledger.read(handle.report())
                self.tell("denoise", done, self.total, preview.draw(done, latents))

            result = generate(pipe, defaults, request, self.tell, on_step)
            report = handle.report().to_dict() if handle else None
        return Run(self.name, self.side, result, report, ledger.cells if handle else None)

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
        self.put(News(self.name, phase, done, total, preview))
