"""A step cache: where the first block does what was expected of it, the others are skipped.

    r = h₁ − h₀                    what the first block adds to the visual tokens
    R = h_L − h₁                   what the others add

' and '' are the last two steps that ran whole, of the same guidance pass. They tell which way r
moves, and the first block, which always runs, how far along that way it is, for each sample:

    a = ⟨r − r', r' − r''⟩ / ⟨r' − r'', r' − r''⟩
    skipped if mean(|r − r̂| + ⅕ |r̂ − r'|) ≤ threshold · mean|r̂|,  r̂ = r' + a (r' − r'')
    h_L = h₁ + R̂,  R̂ = R' + a (R' − R'')

a = 0 is ParaAttention's First-Block-Cache, after TeaCache (arXiv 2411.19108): what was seen last.
That the blocks behind move along as the first ones do is DiCache's observation (arXiv 2508.17356);
the projection and the fifth are ours: with it what is held against the threshold was, in the
median of the embedded model's steps, the relative error of R̂, as it was that of R' where a = 0. R̂
is added behind the last block, so that what a model adds between its blocks (a ControlNet) is not
added twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dit_accel.forward.arguments import given
from dit_accel.forward.clock import Clock
from dit_accel.parallel.context import config_of, group_of
from dit_accel.pipelines import registry
from dit_accel.pruning import step_cache
from dit_accel.pruning.lists import arguments, give_back, take_over
from dit_accel.pruning.rows import Rows
from dit_accel.runtime import patch, threads
from dit_accel.runtime.contexts import follow, leave
from dit_accel.runtime.decision import Decision

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from dit_accel.pipelines.denoisers import Pipe

MARK = "_dit_accel_cache"  # where a transformer keeps its cache
Streams = tuple[Any, ...]  # visual tokens, and the text or None; or the one row of both
_NAME = "the step cache"


class Known(NamedTuple):
    """Of the last step that ran whole: r, and R of each stream, None where it has none; and those
    of the one before it."""

    first: Tensor
    rest: Streams = ()
    before: Known | None = None


def of(transformer: nn.Module) -> FirstBlockCache | None:
    """That of this transformer."""
    found = vars(transformer).get(MARK)
    return found if found is not None and found.transformer is transformer else None


class FirstBlockCache:
    """That of one transformer. `install` and `remove` are exact inverses.

    decision: whether a forward is skipped.
    extrapolates: along the last two whole steps; else the last one is what is expected.
    memory: pass name → what is known.
    computes: the last forward ran whole.
    """

    outer: ClassVar[bool] = True

    def __init__(
        self, transformer: nn.Module, threshold: float, clock: Clock, extrapolates: bool = True
    ) -> None:
        kind, adapter = type(transformer).__name__, registry.find(transformer)
        if adapter.span is None:
            raise ValueError(f"{kind} cannot have a step cache: {adapter.no_span}")
        blocks = sum(map(len, adapter.span.lists(transformer)))
        if blocks < 2:
            raise ValueError(f"{kind} cannot have a step cache: it has one block only")
        self._handles: list[RemovableHandle] = []
        self.__setstate__((transformer, threshold, clock, extrapolates, blocks, self._handles))

    def __getstate__(self) -> tuple[Any, ...]:
        """A copy starts anew."""
        own = self._own, self.extrapolates, self._blocks, self._handles
        return self.transformer, self.decision.threshold, *own

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.transformer, threshold, *own = state
        self._own, self.extrapolates, self._blocks, self._handles = own
        self.decision = Decision(threshold)
        self.adapter = registry.find(self.transformer)
        assert self.adapter.span is not None, "see __init__"
        self.site = self.adapter.span
        self.rows, self.memory = Rows(self.site), dict[str, Known]()
        self.computes, self.running, self._met = True, False, False
        self._clock, self._generation = self._own, -1
        self._head: tuple[Streams, bool] = (), False
        self._pace: Tensor | None = None  # a of the forward at hand [B], None for 0

    def install(self) -> None:
        """On the transformer."""
        transformer, first = self.transformer, 0
        for name, blocks in zip(self.site.blocks, self.site.lists(transformer), strict=True):
            take_over(blocks, self, first, name in self.site.single)
            first += len(blocks)
        self._handles += [
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            transformer.register_forward_hook(self._after),
        ]
        follow(transformer, self._own)
        vars(transformer)[MARK] = self

    def remove(self) -> None:
        """Put everything back."""
        vars(self.transformer).pop(MARK, None)
        leave(self.transformer, self._own)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for blocks in self.site.lists(self.transformer):
            give_back(blocks, self)
        self.memory.clear()

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the transformer."""
        threads.enter(self, module)
        entry, self.running, self._met = patch.of(module), True, False
        if entry is None:
            bound = given(module, args, kwargs)
            geometry = self.adapter.geometry(module, bound)
            self._own.tick(geometry, bound.get("timestep"), module)
        elif (span := entry.span) is not None:
            why = step_cache.outside(_NAME, span.first, span.last, self._blocks)
            if why:
                raise RuntimeError(f"{type(module).__name__} cannot run token pruning: {why}")

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: Any, output: object) -> None:
        """Forward hook of the transformer. RuntimeError when it did not go through its blocks."""
        self.running = False
        self._head, self._pace = ((), False), None
        if not self._met:
            raise RuntimeError(
                f"{_NAME} did not meet the blocks of {type(module).__name__}: something else runs "
                "them; leave the step cache out or switch that off"
            )

    def run(self, number: int, block: Any, args: Any, kwargs: Any, single: bool) -> object:
        """Block `number`, or what it is skipped by. single: see lists.Runner."""
        if number == 0:
            return self._first(block, args, kwargs, single)
        if not self.computes:
            return self._skip(number, arguments(block, args, kwargs).arguments, single)
        out = block(*args, **kwargs)
        if number == self._blocks - 1:
            pairs = zip(self._streams(out, single), self._heads(single), strict=True)
            rest = tuple(_gained(x, head) for x, head in pairs)
            if rest[0] is None:
                raise RuntimeError(
                    f"{_NAME} expects the last block of {type(self.transformer).__name__} to "
                    "return as many tokens as the first: leave the step cache out"
                )
            name = self._clock.passname
            self.memory[name] = self.memory[name]._replace(rest=rest)
        return out

    def _first(self, block: Any, args: Any, kwargs: Any, single: bool) -> object:
        """The first block, and whether the others run."""
        self.begin()
        came = arguments(block, args, kwargs).arguments[self.site.hidden]
        out = block(*args, **kwargs)
        streams = self._streams(out, single)
        self._head, self._met = (streams, single), True
        first, known = self._added(streams[0], came), self.memory.get(self._clock.passname)
        if known is not None and (not known.rest or known.first.shape != first.shape):
            known = None
        self.computes = known is None or self._differs(first, known)
        if self.computes:
            before = None if known is None or not self.extrapolates else known._replace(before=None)
            self.memory[self._clock.passname] = Known(first, before=before)
        elif (entry := patch.of(self.transformer)) is not None:
            entry.engine.books.skip()
            if entry.span is not None:
                entry.span.cached = True
        return out

    def _differs(self, first: Tensor, known: Known) -> bool:
        """Is r another than was expected?"""
        expected, group = known.first, self._group()
        if known.before is not None:
            self._pace = self.decision.pace(first, known.first, known.before.first, group)
            expected = _moved(known.first, known.before.first, self._pace)
        return self.decision.differs(first, known.first, expected, group)

    def _added(self, out: Tensor, came: Tensor) -> Tensor:
        """r of this process's tokens, which may be dealt out within the block."""
        if out.shape[1] != came.shape[1] and (group := self._group()) is not None:
            rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
            came = came.tensor_split(ranks, dim=1)[rank]
        return (out - came).detach()

    def _skip(self, number: int, given: dict[str, Any], single: bool) -> object:
        """What a skipped block returns: what it was given, and behind the last one R is added."""
        hidden, text = given[self.site.hidden], given.get(self.site.text)
        if number < self._blocks - 1:
            return hidden if single else self.rows.join(hidden, text, False)
        known = self.memory[self._clock.passname]
        rest = known.rest
        if self._pace is not None and known.before is not None:
            pairs = zip(rest, known.before.rest, strict=True)
            rest = tuple(_moved(last, before, self._pace) for last, before in pairs)
        pairs = zip(self._heads(single), rest, strict=True)
        found = [None if more is None else head.to(more.device) + more for head, more in pairs]
        if single:
            return found[0]
        visual, more = found
        assert visual is not None, "see run"
        return self.rows.join(visual, text if more is None else more, False)

    def _streams(self, out: Any, single: bool) -> Streams:
        """What a block returns."""
        return (out,) if single else self.rows.split(out, False)

    def _heads(self, single: bool) -> Streams:
        """What the first block returned, as a list of this kind has it."""
        streams, alone = self._head
        if not single or alone:
            return streams
        visual, text = streams
        return (self.rows.join(visual, text, True),)

    def begin(self) -> None:
        """The clock of the forward at hand; a new generation knows nothing."""
        entry = patch.of(self.transformer)
        clock = self._own if entry is None else entry.engine.clock
        if clock is not self._clock or clock.generation != self._generation:
            self._clock, self._generation = clock, clock.generation
            self.memory.clear()
        self.rows.begin(clock.geometry, None)

    @torch.compiler.disable
    def _group(self) -> Any:
        """The processes that share the sequence, or None."""
        config = config_of(self._attention.processor)
        return None if config is None else group_of(config)

    @functools.cached_property
    def _attention(self) -> Any:
        """A module whose processor tells."""
        return next(iter(self.adapter.attentions(self.transformer).values()))

    def restore(self, memory: dict[str, Known], computes: bool | None) -> None:
        """As a forward left it that was recorded, and is replayed."""
        self.begin()
        self.memory = dict(memory)
        self.computes, self._met = bool(computes), True


def check_threshold(threshold: float) -> None:
    """ValueError for a threshold that is not positive."""
    if not threshold > 0:
        raise ValueError(
            f"step_cache is a relative change > 0 below which a step is skipped, not {threshold}; "
            "0.05 is cautious"
        )


@contextmanager
def cached(
    pipe: Pipe, transformers: list[nn.Module], threshold: float, extrapolates: bool = True
) -> Iterator[None]:
    """A step cache for each of a pipeline's transformers, for the length of a block. ValueError
    where one cannot have it; nothing is changed then."""
    check_threshold(threshold)
    clock, made = Clock(pipe), list[FirstBlockCache]()
    for transformer in transformers:
        kind = type(transformer).__name__
        if of(transformer) is not None or getattr(transformer, "is_cache_enabled", False):
            raise ValueError(f"this {kind} has a step cache already: disable that one first")
        if getattr(transformer, "_is_cached", False):
            raise ValueError(
                f"cache-dit is enabled on this {kind}: it runs the blocks in its own loops; "
                "disable one of the two"
            )
        made.append(FirstBlockCache(transformer, threshold, clock, extrapolates))
    with ExitStack() as stack:
        for one in made:
            stack.callback(one.remove)
            one.install()
        yield


def _moved(last: Any, before: Any, pace: Tensor) -> Any:
    """As far along the way from `before` to `last` [B, …] as the pace says; None stays None, and
    what the way of is not known stays as it was last."""
    if last is None or before is None or last.shape != before.shape:
        return last
    pace = pace.to(last.device, last.dtype).view(-1, *[1] * (last.dim() - 1))
    return torch.addcmul(last, pace, last - before)


def _gained(x: Tensor | None, head: Tensor | None) -> Tensor | None:
    """What is added to a stream by all blocks but the first; None where it is another one."""
    if x is None or head is None or x.shape != head.shape:
        return None
    return (x - head.to(x.device)).detach()
