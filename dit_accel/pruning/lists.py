"""A model's lists of blocks, which hand out each block wrapped while a forward runs.

The model's own forward loops over its lists; what wraps a block stands outside of whatever the
block is compiled to and of the hooks that it has.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import nn

from dit_accel.forward.arguments import signature

if TYPE_CHECKING:
    from collections.abc import Iterator


class Runner(Protocol):
    """What runs the blocks in place of the model. outer: around another one."""

    outer: ClassVar[bool]

    @property
    def running(self) -> bool:
        """Does a forward run?"""

    def run(self, number: int, block: Any, args: Any, kwargs: Any, single: bool) -> object:
        """What block `number` of the model returns, or what stands for it. single: its list holds
        text and visual tokens in one row."""


class _Taken(NamedTuple):
    """A list's blocks are numbered from `first`."""

    runner: Runner
    first: int
    single: bool


def take_over(blocks: nn.ModuleList, runner: Runner, first: int, single: bool) -> None:
    """Let a list hand out its blocks, numbered from `first`, wrapped in `runner.run`, while a
    forward runs. single: see Runner.run."""
    taken = vars(blocks).setdefault("_accel_taken", [])
    taken.append(_Taken(runner, first, single))
    taken.sort(key=lambda own: own.runner.outer)
    if not hasattr(type(blocks), "_accel_kind"):
        stock: Any = type(blocks)
        blocks.__class__ = _list_class(stock)


def give_back(blocks: nn.ModuleList, runner: Runner) -> None:
    """The list as it was before this runner took it over, if it did."""
    taken = vars(blocks).get("_accel_taken", [])
    taken[:] = [own for own in taken if own.runner is not runner]
    if not taken and vars(blocks).pop("_accel_taken", None) is not None:
        ours: Any = type(blocks)
        blocks.__class__ = ours._accel_kind


@torch.compiler.disable
def arguments(block: Any, args: Any, kwargs: Any) -> inspect.BoundArguments:
    """What a block, wrapped or not, is called with, by name."""
    own = block
    while isinstance(own, _Wrapped):
        own = own._block
    own = getattr(own, "_orig_mod", own)  # of torch.compile(block)
    return signature(type(own).forward).bind(block, *args, **kwargs)


@functools.cache
def _list_class(kind: type) -> type:
    class TakenList(kind):
        _accel_kind = kind

        def __iter__(self) -> Iterator[Any]:
            inner: Iterator[Any] = super().__iter__()
            for taken in self.__dict__.get("_accel_taken", ()):  # a slice has none
                if taken.runner.running:
                    inner = _wrapped(taken, inner)
            return inner

        def __reduce_ex__(self, protocol: object) -> tuple[object, ...]:
            return _blank, (kind,), dict(self.__dict__)

    TakenList.__name__ = kind.__name__
    return TakenList


def _blank(kind: type) -> nn.ModuleList:
    return object.__new__(_list_class(kind))


def _wrapped(taken: _Taken, blocks: Iterator[Any]) -> Iterator[_Wrapped]:
    for number, block in enumerate(blocks, taken.first):
        yield _Wrapped(taken.runner, number, block, taken.single)


class _Wrapped:
    """A block that runs as the runner says; its attributes are the block's."""

    def __init__(self, runner: Runner, number: int, block: Any, single: bool) -> None:
        vars(self).update(_runner=runner, _number=number, _block=block, _single=single)

    def __call__(self, *args: object, **kwargs: object) -> object:
        return self._runner.run(self._number, self._block, args, kwargs, self._single)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._block, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._block, name)
