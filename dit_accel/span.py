"""Token pruning at work: what happens before, between and after a transformer's blocks.

The model's own forward loops over its list of blocks; while a forward runs, the list hands out
each block wrapped in `Span.run`, outside of whatever the block is compiled to.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.clock import Clock
from dit_accel.pipelines.base import SpanSite
from dit_accel.prune import TokenPruning
from dit_accel.prune_criteria import CRITERIA, Facts, pick, transition_variation
from dit_accel.table import block_count, kept_blocks


@dataclass
class Memory:
    """One guidance pass between steps: R, its rate of change, and what the probe saw.

    residual: [B, N, C] R. rate: [B, N, C] change of R per step, or None. seen: int64 [N], the step
    at which each token ran last. reference: [B, N, C], the probe's residual at that step.
    """

    residual: Tensor
    seen: Tensor
    reference: Tensor
    rate: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        found = (self.residual, self.seen, self.reference, self.rate)
        return [x for x in found if x is not None]


@dataclass
class Span:
    """The pruned blocks of one transformer.

    blocks: how many the model has. `live` is the number of tokens that run just now, None for all.
    """

    prune: TokenPruning
    site: SpanSite
    clock: Clock
    blocks: int
    memory: dict[str, Memory] = field(default_factory=dict)
    output: dict[str, Tensor] = field(default_factory=dict)
    transition: Tensor | None = None
    live: int | None = None
    anchored: Tensor | None = None
    running: bool = False
    share: float = 1.0
    generation: int = -1
    _chosen: tuple[int, int, Tensor] | None = None
    _index: Tensor | None = None
    _enter: Tensor | None = None
    _probe: Tensor | None = None
    _rows: dict[int, tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first, self.last = self.prune.span(self.blocks)

    def begin(self, index: Tensor | None) -> None:
        """A forward starts. index: the order of the tokens, for the anchored frames."""
        if self.clock.generation != self.generation:
            self.generation = self.clock.generation
            self.memory.clear()
            self.output.clear()
            self._chosen = None
        self.running, self.share = True, 1.0
        self.transition = self.live = self._index = None
        self._rows.clear()
        self.anchored = self._anchors(index)

    def end(self) -> None:
        self.running, self.live, self._enter, self._probe = False, None, None, None

    def _anchors(self, index: Tensor | None) -> Tensor | None:
        grid, frames = self.clock.geometry.grid, self.prune.anchor_frames
        if not frames:
            return None
        token = torch.arange(grid[0] * grid[1] * grid[2])
        token = token if index is None else index.cpu()
        return token < frames * grid[1] * grid[2]

    def run(self, number: int, block: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Block `number` of the model on all tokens, on the chosen ones, or not at all."""
        bound = _signature(type(block).forward).bind(block, *args, **kwargs).arguments
        bound.pop("self")
        tokens = bound[self.site.hidden]
        if number == 0:
            self._enter = tokens
        if number == self.first:
            self._probe = tokens - self._enter
            self._enter = tokens
            self._index = self._select(tokens)
        inside = self.first <= number < self.last
        if self._index is None or not inside:
            out = block(*args, **kwargs)
        elif self._index.numel() == 0:
            out = tokens
        else:
            if number == self.first:
                bound[self.site.hidden] = tokens[:, self._index]
                self.live = self._index.numel()
            out = block(**self._gathered(bound))
        if number == self.last - 1:
            out = self._leave(out)
        return out

    def _gathered(self, bound: dict[str, Any]) -> dict[str, Any]:
        """The block's arguments with per-token rows of the chosen tokens only."""
        for name, dim, rank in self.site.rows:
            value = bound.get(name)
            if value is not None:
                bound[name] = self._take(value, dim, rank)
        return bound

    def _take(self, value: Any, dim: int, rank: int) -> Any:
        """`value` or the tensors in it that have `rank` dimensions, gathered along `dim`; once."""
        if id(value) not in self._rows:
            if isinstance(value, (tuple, list)):
                taken = type(value)(self._take(x, dim, rank) for x in value)
            else:
                taken = value.index_select(dim, self._index) if value.ndim == rank else value
            self._rows[id(value)] = (value, taken)  # the value is held, so its id stays its own
        return self._rows[id(value)][1]

    def _select(self, tokens: Tensor) -> Tensor | None:
        """The tokens that run, None for all; the first pass of a step decides for the others."""
        clock, n = self.clock, tokens.shape[1]
        known = self.memory.get(clock.passname)
        stale = known is None or known.residual.shape != tokens.shape
        count = kept_blocks(self.prune.keep, block_count(n, self.prune.block))
        count = count if self.prune.keep else 0
        if stale or self.prune.keep == 1 or not self.prune.prunes(clock.step, clock.steps):
            return None
        if self._chosen is None or self._chosen[:2] != (clock.step, n):
            past = (known.reference, known.seen)
            chance = (clock.step, self.prune.seed, self.prune.block)
            facts = Facts(self._probe, *past, *chance, self.transition, self.output)
            scores = CRITERIA[self.prune.criterion](facts)
            if scores is None:
                return None
            always = None if self.anchored is None else self.anchored.to(tokens.device)
            self._chosen = (clock.step, n, pick(scores, count, self.prune.block, always))
        self.share = self._chosen[2].numel() / n
        return self._chosen[2]

    def _leave(self, out: Tensor) -> Tensor:
        """The span's end: update R where tokens ran, restore the others from it."""
        clock, index, enter = self.clock, self._index, self._enter
        self.live = None
        if index is None:
            index = torch.arange(out.shape[1], device=out.device)
            full = out
        else:
            known = self.memory[clock.passname]
            full = enter + self._expected(known)
            if index.numel():
                full[:, index] = out
        self._update(index, full, enter)
        return full

    def _expected(self, known: Memory) -> Tensor:
        """R of each token now: as it was, or extrapolated by its rate."""
        if self.prune.restore == "reuse" or known.rate is None:
            return known.residual
        age = (self.clock.step - known.seen).to(known.residual.dtype)
        return known.residual + age[:, None] * known.rate

    def _update(self, index: Tensor, full: Tensor, enter: Tensor) -> None:
        step, name = self.clock.step, self.clock.passname
        known = self.memory.get(name)
        if known is None or known.residual.shape != full.shape:
            seen = torch.full((full.shape[1],), step, device=full.device)
            self.memory[name] = Memory(full - enter, seen, self._probe)
            return
        new = full[:, index] - enter[:, index]
        if self.prune.restore == "taylor":
            age = (step - known.seen[index]).clamp(min=1).to(new.dtype)
            if known.rate is None:
                known.rate = torch.zeros_like(known.residual)
            known.rate[:, index] = (new - known.residual[:, index]) / age[:, None]
        known.residual[:, index] = new
        known.reference[:, index] = self._probe[:, index]
        known.seen[index] = step

    def watch_transition(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of a probe module."""
        if self.running:
            found = transition_variation(args[0], output)
            self.transition = found if self.transition is None else self.transition + found

    def watch_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the model's last projection."""
        if self.running:
            self.output[self.clock.passname] = output

    def nbytes(self) -> int:
        """Bytes kept between steps."""
        kept = [x for memory in self.memory.values() for x in memory.tensors()]
        return sum(x.nbytes for x in (*kept, *self.output.values()))


@functools.cache
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def blocks_class(kind: type) -> type:
    """The class of a ModuleList whose iteration goes through `_accel_span` while a forward runs."""

    class SpanList(kind):
        def __iter__(self):
            span = self.__dict__["_accel_span"]
            inner = super().__iter__()
            if not span.running:
                return inner
            return (_wrapped(span, n, block) for n, block in enumerate(inner))

    SpanList.__name__ = kind.__name__
    return SpanList


def _wrapped(span: Span, number: int, block: nn.Module) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return span.run(number, block, args, kwargs)

    return call
