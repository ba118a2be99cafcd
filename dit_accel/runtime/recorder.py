"""What records a transformer forward, to compute it again without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Recorder(Protocol):
    """What records; `Cuda`, and an emulation on the CPU in the tests."""

    def check(self, transformer: nn.Module) -> None:
        """ValueError for one whose forwards it cannot record."""

    def reads(self, x: Tensor) -> bool:
        """Whether a replay reads this argument again; what others hold is part of the key."""

    def record(
        self, run: Callable[[], Any], device: torch.device
    ) -> tuple[Any, Callable[[], None]]:
        """What `run` returned, which works on one device, not computed yet, and what computes it
        again in the same memory."""


class Cuda:
    """CUDA graphs, which share their memory: of what a graph computes only what is still referred
    to afterwards outlives it."""

    def __init__(self) -> None:
        self.pools: dict[torch.device, Any] = {}

    def check(self, transformer: nn.Module) -> None:
        """See Recorder."""
        where = sorted({str(x.device) for x in transformer.parameters()})
        if len(where) != 1 or torch.device(where[0]).type != "cuda":
            raise ValueError(
                f"CUDA graphs are for transformers on one CUDA GPU, and this "
                f"{type(transformer).__name__} is on {', '.join(where)}: leave graphs out"
            )

    def reads(self, x: Tensor) -> bool:
        """See Recorder."""
        return x.is_cuda

    def record(
        self, run: Callable[[], Any], device: torch.device
    ) -> tuple[Any, Callable[[], None]]:
        """See Recorder. RuntimeError where `run` waits for the GPU or copies from the host."""
        pool = self.pools.setdefault(device, torch.cuda.graph_pool_handle())
        graph = torch.cuda.CUDAGraph()
        try:
            # the stream of a capture is one of the current device
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, pool=pool, capture_error_mode="relaxed"),
            ):
                out = run()
        except RuntimeError as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"this forward cannot be recorded as a CUDA graph: {why}; leave graphs out"
            ) from error
        return out, graph.replay
