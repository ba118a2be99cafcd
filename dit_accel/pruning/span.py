"""Token pruning at work: what happens before, between and after a transformer's blocks.

While a forward runs, each block comes wrapped in `Span.run` (lists.py). Who runs is said by
select.py, what is seen by observe.py, tokens shared between devices by shared.py.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from dit_accel.forward.clock import Clock
from dit_accel.forward.keys import Tokens, narrow
from dit_accel.pipelines.base import SpanSite
from dit_accel.pruning import step_cache
from dit_accel.pruning.config import TokenPruning
from dit_accel.pruning.context import Context
from dit_accel.pruning.lists import arguments
from dit_accel.pruning.observe import Observer
from dit_accel.pruning.restore import RESTORES, Memory, Past
from dit_accel.pruning.rows import Rows
from dit_accel.pruning.select import Selection
from dit_accel.pruning.shared import Part


class Entry(NamedTuple):
    """What came to the span: tokens [B, N, C], text [B, T, C] or None, what the probe blocks did
    to the tokens."""

    tokens: Tensor
    text: Tensor | None
    probe: Tensor


@dataclass
class Span:
    """The pruned blocks of one transformer.

    prune: how.
    site: where the blocks have their tokens.
    clock: where the generation stands.
    blocks: how many the model has, in all its lists.
    part: of the tokens, where devices share them.
    whole: the tokens that run go back among the others after each block of this forward.
    live: how many visual tokens run just now, None for all.
    inside: a block of the span runs.
    cached: a step cache skips all blocks of this forward but the first.
    memory: pass name → what the span did to its tokens.
    """

    prune: TokenPruning
    site: SpanSite
    clock: Clock
    blocks: int
    part: Part = Part()
    whole: bool = False
    live: int | None = None
    inside: bool = False
    cached: bool = False
    memory: dict[str, Memory] = field(default_factory=dict)
    outer: ClassVar[bool] = False
    _generation: int = -1
    _entered: Entry | None = None

    def __post_init__(self) -> None:
        self.first, self.last = self.prune.span(self.blocks)
        self.rows = Rows(self.site)
        self.observer = Observer(self.prune, self.clock, self.rows)
        self.selection = Selection(self.prune)
        kind = self.prune.context
        self.context = None if kind == "drop" else Context(kind, self.prune.block)

    def __reduce__(self) -> tuple[object, ...]:
        """A copy starts anew."""
        return Span, (self.prune, self.site, self.clock, self.blocks)

    def begin(self, order: Tensor | None) -> None:
        """A forward starts. order: the grid cells of the tokens where they come permuted."""
        if fresh := self.clock.generation != self._generation:
            self.forget()
            self._generation = self.clock.generation
        if self.context:
            self.context.begin(fresh)
        self._clear()
        self.rows.begin(self.clock.geometry, order)

    def forget(self) -> None:
        """What is kept from forward to forward."""
        self._clear()
        self.selection.clear()
        for kept in (self.memory, self.observer.output, getattr(self.context, "memory", {})):
            kept.clear()
        self._generation = -1

    def end(self) -> None:
        """The forward is over. RuntimeError when it did not go through its list of blocks."""
        passed = self._entered is not None or self.cached
        self._clear()
        if not passed:
            raise RuntimeError(
                "token pruning did not meet the model's blocks: something else runs them; "
                "take prune=None or switch that off"
            )

    @property
    def running(self) -> bool:
        """Does a forward run?"""
        return self.rows.running

    def _clear(self) -> None:
        self.live = self._entered = None
        self.inside = self.cached = False
        self.rows.clear()
        self.observer.clear()

    def run(
        self, number: int, block: nn.Module, args: tuple, kwargs: dict, single: bool = False
    ) -> object:
        """Block `number` of the model on all tokens, on the chosen ones, or not at all.

        single: its list holds text and visual tokens in one row.
        """
        bound = arguments(block, args, kwargs)
        tokens, text = self.rows.read(bound.arguments, single, self.live)
        if number == 0:
            self.observer.first = self.part.own(tokens, self.rows.geometry.n_visual)
            self.rows.n = self.observer.first.shape[1]
        if number == self.first and not self.cached:
            self._enter(tokens, text)
        self.inside = self.first <= number < self.last and not self.cached
        index = self.rows.index
        if index is None or not self.inside:
            out = block(*args, **kwargs)
        elif index.numel() == 0:
            out = self.rows.join(tokens, text, single)
        else:
            out = self._run_part(number, block, bound, tokens, text, index, single)
        if number == 0:
            self.cached = step_cache.skips(block)
        if number == self.last - 1 and self.inside:
            out = self._leave(out, single)
        self.inside = False
        return out

    def tokens(self) -> Tokens | None:
        """Which ones, of all devices, an attention call has just now; None for all."""
        if self.live is None:
            return None
        queries = self.live * self.part.ranks
        seen = queries if self.context is None else self.rows.n
        return Tokens(self.rows.geometry._replace(grid=(1, 1, seen)), queries)

    def _enter(self, tokens: Tensor, text: Tensor | None) -> None:
        """The span's start: what the probe did, and who runs."""
        seen, clock = self.observer, self.clock
        self._entered = Entry(tokens, text, seen.enter(tokens))
        known = self.memory.get(clock.passname)
        if known is None or not known.fits(tokens, tokens):
            return
        facts = seen.facts(tokens, self._entered.probe, known)
        due = self.prune.prunes(clock.step, clock.steps, known.full)
        self.rows.index = self.selection.of(facts, self.rows, self.part, due)

    def _run_part(
        self,
        number: int,
        block: nn.Module,
        bound: inspect.BoundArguments,
        visual: Tensor,
        text: Tensor | None,
        index: Tensor,
        single: bool,
    ) -> object:
        """A block of the span on the tokens `index`, which the next one is handed as they are, or,
        where something is added to all of them in between, back among the others."""
        rows, live = self.rows, index.numel()
        self.live = live
        if number == self.first or self.whole:
            rows.write(bound.arguments, single, visual[:, index], text)
        rows.gather(bound.arguments, text, index)
        out = block(*bound.args[1:], **bound.kwargs)
        if not self.whole:
            return out
        ran, text = rows.split(out, single, live)
        self.live = None
        return rows.join(visual.index_copy(1, index, ran), text, single)

    def _leave(self, out: object, single: bool) -> object:
        """The span's end: update R where tokens ran, restore the others from it."""
        rows, index, entry = self.rows, self.rows.index, self._entered
        assert entry is not None, "the span was entered"
        found, text = rows.split(out, single, self.live)
        self.live = None
        if index is None:
            self._remember(entry, None, found - entry.tokens, text)
            return out
        known = self.memory[self.clock.passname]
        if index.numel() == 0:
            text = _moved(entry.text, known.text)
        ran = found if found.shape[1] == index.numel() else found[:, index]
        fresh = ran - entry.tokens[:, index]
        past = Past(known, self.clock.step, index, fresh, entry.tokens, rows.grid, rows.order)
        full = entry.tokens + RESTORES[self.prune.restore](past)
        if index.numel():
            full[:, index] = ran
            self._remember(entry, index, fresh, text)
        return rows.join(full, text, single)

    def _remember(
        self, entry: Entry, index: Tensor | None, fresh: Tensor, text: Tensor | None
    ) -> None:
        """R of the tokens that ran, None for all; and of the text, which left the span so."""
        step, name, probe = self.clock.step, self.clock.passname, entry.probe
        known = self.memory.get(name)
        text = None if text is None or entry.text is None else text - entry.text
        if known is None or (index is None and not known.fits(fresh, probe)):
            self.memory[name] = Memory.of_all(step, fresh, probe, text)
        else:
            known.update(step, index, fresh, probe, text, self.prune.restore == "taylor")

    def keys(
        self, name: object, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, n, H, D] of an attention call of the span, and their mask, with those
        of pruned tokens as the context has them. name: tells the call from others of its forward.
        """
        if self.context is None or not self.inside:
            return k, v, mask
        n, name = self.rows.n, (self.clock.passname, name)
        visual = self.rows.among(k.shape[1], self.live or n)
        if self.live is None or self.rows.index is None:
            self.context.remember(name, k[:, visual], v[:, visual])
            return k, v, mask
        k, v = self.context.complete(name, k, v, visual, self.rows.index, n)
        return k, v, self.context.mask(narrow(mask), visual, n, self.rows.geometry.same_mask)


def nbytes(span: Span) -> int:
    """Bytes kept between steps."""
    kept = [x for memory in span.memory.values() for x in memory.tensors()]
    keys = 0 if span.context is None else span.context.nbytes()
    return keys + sum(x.nbytes for x in (*kept, *span.observer.output.values()))


def _moved(text: Tensor | None, by: Tensor | None) -> Tensor | None:
    """Text tokens with their residual; as they are where it is that of others (a filled cache)."""
    if text is None or by is None:
        return None
    return text + by if text.shape == by.shape else text
