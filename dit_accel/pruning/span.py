"""Token pruning at work: what happens before, between and after a transformer's blocks.

The model's own forward loops over its lists of blocks; while a forward runs, a list hands out
each block wrapped in `Span.run`, outside of whatever the block is compiled to.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.forward.clock import Clock
from dit_accel.forward.keys import narrow
from dit_accel.pipelines.base import Geometry, SpanSite
from dit_accel.pruning import step_cache
from dit_accel.pruning.config import TokenPruning
from dit_accel.pruning.context import Context
from dit_accel.pruning.criteria import (
    CRITERIA,
    JOINT,
    Facts,
    pick,
    text_share,
    transition_variation,
)
from dit_accel.pruning.restore import RESTORES, Memory, Past
from dit_accel.pruning.rows import Rows
from dit_accel.table import block_count, kept_blocks

# What looks at all tokens, or at the model's output.
_OF_ONE_DEVICE = {
    "criterion": ("velocity", "cfg", "text"),
    "restore": ("blend",),
    "context": ("pooled", "stale"),
}


@dataclass
class Span:
    """The pruned blocks of one transformer.

    blocks: how many the model has, in all its lists. `live` is the number of visual tokens that run
    just now, None for all; `inside`: a block of the span runs; `share`: of this forward's tokens,
    those that run the span. whole: in this forward
    the tokens that run go back among the others after each block. place: (rank, ranks) where the
    tokens are shared between devices: each then chooses as many of its own.
    """

    prune: TokenPruning
    site: SpanSite
    clock: Clock
    blocks: int
    memory: dict[str, Memory] = field(default_factory=dict)
    output: dict[str, Tensor] = field(default_factory=dict)
    context: Context | None = None
    transition: Tensor | None = None
    reading: Tensor | None = None
    live: int | None = None
    whole: bool = False
    inside: bool = False
    running: bool = False
    share: float = 1.0
    place: tuple[int, int] = (0, 1)
    generation: int = -1
    _order: Tensor | None = None
    _cached: bool = False
    _chosen: tuple[int, int, Tensor | None] | None = None
    _index: Tensor | None = None
    _start: Tensor | None = None
    _entered: tuple[Tensor, Tensor | None] | None = None
    _probe: Tensor | None = None

    def __post_init__(self) -> None:
        self.first, self.last = self.prune.span(self.blocks)
        self._rows = Rows(self.site)
        if self.prune.context != "drop":
            self.context = Context(self.prune.context, self.prune.block)

    def begin(self, order: Tensor | None) -> None:
        """A forward starts. order: the grid cells of the tokens where they come permuted."""
        if self.clock.generation != self.generation:
            self.generation = self.clock.generation
            self.memory.clear()
            self.output.clear()
            self._chosen = None
            if self.context:
                self.context.memory.clear()
        if self.context:
            self.context.begin()
        self._order = order
        self.running, self.share, self._cached = True, 1.0, False
        self.transition = self.reading = self.live = self._index = self._entered = None
        self._rows.clear()

    def end(self) -> None:
        """The forward is over. RuntimeError when it did not go through its list of blocks."""
        passed = self._entered is not None or self._cached
        self.running = self.inside = False
        self.live = self._start = self._entered = self._probe = None
        self._rows.clear()
        if not passed:
            raise RuntimeError(
                "token pruning did not meet the model's blocks: something else runs them; "
                "take prune=None or switch that off"
            )

    def run(
        self, number: int, block: nn.Module, args: tuple, kwargs: dict, single: bool = False
    ) -> Any:
        """Block `number` of the model on all tokens, on the chosen ones, or not at all.

        single: its list holds text and visual tokens in one row.
        """
        bound = _signature(type(block).forward).bind(block, *args, **kwargs)
        self._rows.geometry = self.clock.geometry
        tokens, text = self._rows.read(bound.arguments, single, self._visual)
        if number == 0:
            self._start = self._own(tokens)
            self._rows.n = self._start.shape[1]
        if number == self.first and not self._cached:
            self._enter(tokens, text)
        self.inside = self.first <= number < self.last and not self._cached
        if self._index is None or not self.inside:
            out = block(*args, **kwargs)
        elif self._index.numel() == 0:
            out = self._rows.join(tokens, text, single)
        else:
            out = self._part(number, block, bound, (tokens, text), single)
        if number == 0:
            self._cached = step_cache.skips(block)
        if number == self.last - 1 and self.inside:
            out = self._leave(out, single)
        self.inside = False
        return out

    def unshared(self, geometry: Geometry, plan: Mapping[str, Any]) -> str:
        """Why this pruning does not run on tokens shared between devices, or "".

        plan: diffusers' own, by which the transformer's tokens are split.
        """
        prune, ranks = self.prune, self.place[1]
        if ranks == 1:
            return ""
        if self.site.text or self.site.single or self.site.count:
            return "its text is shared between devices, too (context parallelism)"
        if f"{self.site.blocks[0]}.0" not in plan:
            return "its tokens are not split between devices at the first block"
        if self.first == 0:
            return "its tokens are shared between devices inside the first block: take first=1"
        if geometry.n_visual % ranks:
            return f"{geometry.n_visual} tokens do not divide by {ranks} devices"
        for name, values in _OF_ONE_DEVICE.items():
            if (value := getattr(prune, name)) in values:
                return f"{name}={value!r} does not run on tokens shared between devices"
        if prune.threshold is not None or prune.anchor_frames:
            return "threshold and anchor_frames would run more tokens on one device than on another"
        return ""

    def _own(self, tokens: Tensor) -> Tensor:
        """This device's tokens, where the first block is still handed all of them."""
        rank, ranks = self.place
        whole = tokens.shape[1] == self.clock.geometry.n_visual
        return tokens.tensor_split(ranks, dim=1)[rank] if whole else tokens

    @property
    def queries(self) -> int | None:
        """How many visual tokens of all devices run just now, None for all."""
        return None if self.live is None else self.live * self.place[1]

    @property
    def _visual(self) -> int:
        """How many visual tokens a row of all kinds holds now."""
        return self.live or self.clock.geometry.n_visual

    def _enter(self, tokens: Tensor, text: Tensor | None) -> None:
        """The span's start: what the probe did, and who runs."""
        self._probe = tokens - self._start
        self._entered = (tokens, text)
        self._index = self._select(tokens)
        self._rows.index = self._index

    def _part(
        self,
        number: int,
        block: nn.Module,
        bound: inspect.BoundArguments,
        tokens: tuple[Tensor, Tensor | None],
        single: bool,
    ) -> Any:
        """A block of the span on the chosen tokens, which the next one is handed as they are, or,
        where something is added to all of them in between, back among the others."""
        visual, text = tokens
        self.live = self._index.numel()
        if number == self.first or self.whole:
            self._rows.write(bound.arguments, single, visual[:, self._index], text)
        self._rows.gather(bound.arguments, text)
        out = block(*bound.args[1:], **bound.kwargs)
        if not self.whole:
            return out
        ran, text = self._rows.split(out, single, self.live)
        self.live = None
        return self._rows.join(visual.index_copy(1, self._index, ran), text, single)

    def _select(self, tokens: Tensor) -> Tensor | None:
        """The tokens that run, None for all; the first pass of a step decides for the others."""
        clock, n = self.clock, tokens.shape[1]
        known = self.memory.get(clock.passname)
        if known is None or known.residual.shape != tokens.shape:
            return None
        if self._chosen is None or self._chosen[:2] != (clock.step, n):
            self._chosen = (clock.step, n, self._choose(known, n))
        index = self._chosen[2]
        self.share = 1.0 if index is None else index.numel() / n
        return index

    def _choose(self, known: Memory, n: int) -> Tensor | None:
        prune, clock = self.prune, self.clock
        if not prune.prunes(clock.step, clock.steps, known.full):
            return None
        facts = Facts(
            self._probe,
            known.reference,
            known.seen,
            clock.step,
            prune.seed,
            prune.block,
            self.transition,
            self.output,
            self._entered[0],
            self.reading,
        )
        scores = {**CRITERIA, **JOINT}[prune.criterion](facts)
        if scores is None:
            return None
        count = kept_blocks(prune.keep, block_count(n, prune.block)) if prune.keep else 0
        return pick(scores, count, prune.block, self._anchors(n), prune.threshold)

    def _anchors(self, n: int) -> Tensor | None:
        """bool [N]: the tokens of the frames that always run."""
        if self.place[1] > 1:  # with a short last block chosen here and not there, counts differ
            tail = n % self.prune.block if self.prune.keep else 0
            return torch.arange(n, device=self._entered[0].device) >= n - tail if tail else None
        if not self.prune.anchor_frames:
            return None
        _, h, w = self.clock.geometry.grid
        device = self._entered[0].device
        cell = torch.arange(n, device=device) if self._order is None else self._order.to(device)
        return cell < self.prune.anchor_frames * h * w

    def _leave(self, out: Any, single: bool) -> Any:
        """The span's end: update R where tokens ran, restore the others from it."""
        index, (entered, text_before) = self._index, self._entered
        found, text = self._rows.split(out, single, self._visual)
        self.live = None
        known = self.memory.get(self.clock.passname)
        if index is None:
            self._update(None, found - entered, text if text is None else text - text_before)
            return out
        if index.numel() == 0:
            text = _moved(text_before, known.text)
        ran = found if found.shape[1] == index.numel() else found[:, index]
        fresh = ran - entered[:, index]
        past = Past(known, self.clock.step, index, fresh, entered, self._grid(), self._order)
        full = entered + RESTORES[self.prune.restore](past)
        if index.numel():
            full[:, index] = ran
            self._update(index, fresh, None if text is None else text - text_before)
        return self._rows.join(full, text, single)

    def _grid(self) -> tuple[int, int, int]:
        """Where the tokens lie; a row when the model carries others than the grid's."""
        n, geometry = self._entered[0].shape[1], self.clock.geometry
        return geometry.grid if geometry.n_visual == n else (1, 1, n)

    def _update(self, index: Tensor | None, fresh: Tensor, text: Tensor | None) -> None:
        """Remember R of the tokens that ran, None for all; and of the text."""
        step, name = self.clock.step, self.clock.passname
        known = self.memory.get(name)
        if index is None and (known is None or known.residual.shape != fresh.shape):
            seen = torch.full((fresh.shape[1],), step, device=fresh.device)
            self.memory[name] = Memory(fresh, seen, self._probe, step, text=text)
            return
        if index is None:
            known.full = step
            index = torch.arange(fresh.shape[1], device=fresh.device)
        if self.prune.restore == "taylor":
            age = (step - known.seen[index]).clamp(min=1).to(fresh.dtype)
            if known.rate is None:
                known.rate = torch.zeros_like(known.residual)
            known.rate[:, index] = (fresh - known.residual[:, index]) / age[:, None]
        known.residual[:, index] = fresh
        known.reference[:, index] = self._probe[:, index]
        known.seen[index] = step
        known.text = text

    def keys(
        self, name: Any, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, n, H, D] of an attention call of the span, and their mask, with those
        of pruned tokens as the context has them. name: tells the call from others of its forward.
        """
        if self.context is None or not self.inside:
            return k, v, mask
        n, name = self._entered[0].shape[1], (self.clock.passname, name)
        first = (k.shape[1] - (self.live or n)) * self.clock.geometry.text_first
        visual = slice(first, first + (self.live or n))
        if self.live is None:
            self.context.remember(name, k[:, visual], v[:, visual])
            return k, v, mask
        whole = self.context.complete(name, k, v, visual, self._index, n)
        product = self.clock.geometry.same_mask
        return *whole, self.context.mask(narrow(mask), visual, n, product)

    def watch_attention(self, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
        """An attention call [B, n, H, D] comes; those of probe blocks tell who reads the text."""
        probing = self.running and self._start is not None and self._entered is None
        if self.prune.criterion != "text" or not probing:
            return
        n, n_keys = self._start.shape[1], k.shape[1]
        first = (n_keys - n) * self.clock.geometry.text_first
        visual = slice(first, first + n)
        if n_keys == n:  # a self-attention of the visual tokens alone
            return
        padding = mask is not None and mask.dtype == torch.bool and mask.shape[-2] == 1
        queries = q if q.shape[1] == n else q[:, visual]
        share = text_share(queries, k, visual, mask if padding else None, self.prune.block)
        self.reading = share if self.reading is None else self.reading + share

    @property
    def visual_keys(self) -> int | None:
        """How many visual tokens the keys of a call stand for while tokens are pruned."""
        return self.queries if self.context is None or self.live is None else self._chosen[1]

    def watch_transition(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Forward hook of a probe module; of joint attention the visual part is first."""
        if self.running:
            x = args[0] if args else kwargs["hidden_states"]
            y = output[0] if isinstance(output, tuple) else output
            found = transition_variation(*map(self._rows.visual, (x, y)))
            self.transition = found if self.transition is None else self.transition + found

    def watch_output(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """Forward hook of the model's last projection."""
        if self.running:
            output = output.transpose(0, 1) if self.site.tokens_first else output
            self.output[self.clock.passname] = self._rows.visual(output)

    def nbytes(self) -> int:
        """Bytes kept between steps."""
        kept = [x for memory in self.memory.values() for x in memory.tensors()]
        keys = 0 if self.context is None else self.context.nbytes()
        return keys + sum(x.nbytes for x in (*kept, *self.output.values()))


@functools.cache
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def blocks_class(kind: type) -> type:
    """The class of a ModuleList whose iteration goes through `_accel_span` while a forward runs."""

    class SpanList(kind):
        def __iter__(self):
            span, first, single = self.__dict__.get("_accel_span", (None, 0, False))
            inner = super().__iter__()
            if span is None or not span.running:  # a slice has none
                return inner
            return (_Wrapped(span, n, block, single) for n, block in enumerate(inner, first))

    SpanList.__name__ = kind.__name__
    return SpanList


def _moved(text: Tensor | None, by: Tensor | None) -> Tensor | None:
    """Text tokens with their residual; as they are where it is that of others (a filled cache)."""
    if text is None or by is None:
        return None
    return text + by if text.shape == by.shape else text


class _Wrapped:
    """A block that runs as the span says; its attributes are its own."""

    def __init__(self, span: Span, number: int, block: nn.Module, single: bool) -> None:
        self._span, self._number, self._block, self._single = span, number, block, single

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._span.run(self._number, self._block, args, kwargs, self._single)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)
