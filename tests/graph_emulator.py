"""CUDA graphs on the CPU: what a block runs is noted, operator by operator, and run again later in
the memory that it took, with nothing of Python between."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.runtime.recorder import Recording

# of what has been computed; numbers of layers lie on the host
WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero"}


class Noted(TorchDispatchMode):
    """Notes each operator with the tensors that it was given and that it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, list[Any]]] = []
        self.made: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        computed = any(id(x) in self.made for x in tree_leaves((args, kwargs)))
        if computed and func.name().split(".")[0] in WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tree_leaves(out)))
        self.made |= set(map(id, tree_leaves(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, found in self.calls:
            for old, new in zip(found, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Emulated:
    """A recorder, see dit_accel.runtime.graphs. recorded, replayed: how often."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def check(self, transformer: torch.nn.Module) -> None:
        """Any."""

    def reads(self, x: torch.Tensor) -> bool:
        return True

    def record(self, run, device):
        pieces, asked = [Noted()], []

        def ask(x, decide):
            pieces[-1].__exit__(None, None, None)
            pieces.append(Noted())
            pieces[-1].made |= pieces[-2].made
            asked.append(x)
            try:
                return decide(x.item())
            finally:
                pieces[-1].__enter__()

        pieces[-1].__enter__()
        try:
            out = run(ask)
        finally:
            pieces[-1].__exit__(None, None, None)
        self.recorded += 1
        return Recording(out, [partial(self._replay, noted) for noted in pieces], asked)

    def _replay(self, noted: Noted) -> None:
        self.replayed += 1
        with torch.no_grad():
            noted.replay()
