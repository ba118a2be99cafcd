"""What records a transformer forward, to compute it again without Python."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Ask = Callable[[Tensor, Callable[[float], bool]], bool]


class NotRecorded(ValueError, RuntimeError):
    """CUDA graphs cannot hold this; the message says why, and to leave graphs out."""


class Recording(NamedTuple):
    """What a forward returned, not computed yet but for what it asked; pieces: what computes it
    again in the same memory, in turn; asked: what is known after each but the last."""

    out: Any
    pieces: list[Callable[[], None]]
    asked: list[Tensor]


class Recorder(Protocol):
    """What records; `Cuda`, and an emulation on the CPU in the tests."""

    def check(self, transformer: nn.Module) -> None:
        """NotRecorded for one whose forwards it cannot record."""

    def reads(self, x: Tensor) -> bool:
        """Whether a replay reads this argument again; what others hold is part of the key."""

    def record(self, run: Callable[[Ask], Any], device: torch.device) -> Recording:
        """What `run` does on one device. It is given what it may ask: a tensor of one element, and
        what to make of its value; up to there it is computed then, and a piece ends."""


class Cuda:
    """CUDA graphs, which share their memory: of what a graph computes only what is still referred
    to afterwards outlives it."""

    def __init__(self) -> None:
        self.places: dict[torch.device, Any] = {}  # pool of memory, stream

    def check(self, transformer: nn.Module) -> None:
        """See Recorder."""
        where = sorted({str(x.device) for x in transformer.parameters()})
        if len(where) != 1 or torch.device(where[0]).type != "cuda":
            raise NotRecorded(
                f"CUDA graphs are for transformers on one CUDA GPU, and this "
                f"{type(transformer).__name__} is on {', '.join(where)}: leave graphs out"
            )

    def reads(self, x: Tensor) -> bool:
        """See Recorder."""
        return x.is_cuda

    def record(self, run: Callable[[Ask], Any], device: torch.device) -> Recording:
        """See Recorder. NotRecorded where `run` waits for the GPU or copies from the host."""
        if device not in self.places:
            self.places[device] = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        pool, stream = self.places[device]
        graphs: list[torch.cuda.CUDAGraph] = []
        asked: list[Tensor] = []

        def begin() -> None:
            graphs.append(torch.cuda.CUDAGraph())
            graphs[-1].capture_begin(pool=pool, capture_error_mode="relaxed")

        def ask(x: Tensor, decide: Callable[[float], bool]) -> bool:
            graphs[-1].capture_end()
            graphs[-1].replay()
            answer = decide(x.item())
            asked.append(x)
            begin()
            return answer

        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            with torch.cuda.stream(stream):
                try:
                    begin()
                    out = run(ask)
                    graphs[-1].capture_end()
                except BaseException as error:
                    with suppress(RuntimeError):
                        graphs[-1].capture_end()  # it may have ended
                    if not isinstance(error, RuntimeError):
                        raise
                    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise NotRecorded(
                        f"this forward cannot be recorded as a CUDA graph: {why}; leave graphs out"
                    ) from error
        return Recording(out, [graph.replay for graph in graphs], asked)
