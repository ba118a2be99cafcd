"""What happens at an attention call: plan lookup, then dense or the method.

One Engine per accelerated pipeline. It knows nothing of modules or processors (patch.py does): it
is given tensors and the dense function to fall back to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.config import AccelConfig
from dit_accel.forward.clock import Clock
from dit_accel.forward.keys import Reader, Tokens
from dit_accel.forward.order import Order
from dit_accel.forward.place import Place, differentiable, in_backward
from dit_accel.machine import Stopwatch
from dit_accel.ops import dispatch
from dit_accel.ops.backends import Backends
from dit_accel.parallel.sharded import ALL, Shard
from dit_accel.pipelines.base import Geometry
from dit_accel.pruning.span import Span, nbytes
from dit_accel.runtime import again, joint
from dit_accel.runtime.books import Books, StepBook
from dit_accel.runtime.circumstances import circumstances, why_dense
from dit_accel.runtime.state import Announcer
from dit_accel.schedule import Action, Plan


@dataclass(eq=False)
class Engine:
    """The state of an accelerated pipeline; dies with it. `begin` opens a transformer forward,
    `attend` serves each attention call in it, `end` closes it.

    config, plans, clock: how, when (of each transformer), and where the generation stands.
    books: what is counted.
    spans, span: the token pruning of each transformer, and of the one that runs.
    state: (pass, (layer, call)) → what the method keeps there.
    together: (layer, call) → what it keeps for all passes.
    stateless_from: the first layer whose state finds no room, or None.
    place: where the forward that runs stands.
    """

    config: AccelConfig
    plans: list[Plan]
    clock: Clock
    books: Books
    spans: list[Span] = field(default_factory=list)
    state: dict[tuple[str, tuple[int, int]], dict[str, Any]] = field(default_factory=dict)
    together: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    span: Span | None = None
    stateless_from: int | None = None
    place: Place | None = None
    _open: bool = False
    _kept: int = 0
    _again: Books | None = None

    def __post_init__(self) -> None:
        self.order = Order(self.config.order, self.config.tile)
        self.backends = Backends(named) if (named := self.config.dense) else None
        self._announce = Announcer(self.config.method, self.clock, self.books, self.plans)

    def __reduce__(self) -> tuple[object, ...]:
        """A copy starts anew, with books of its own."""
        return Engine, (self.config, self.plans, self.clock, self.books.blank(), self.spans)

    def begin(
        self,
        geometry: Geometry,
        device: torch.device,
        carried: bool = False,
        span: Span | None = None,
        timestep: Tensor | float | None = None,
        model: nn.Module | None = None,
    ) -> None:
        """A transformer forward starts: move the clock, drop stale state, choose the order.

        carried: the adapter can carry permuted tokens through the whole model; otherwise each
        attention call permutes its own queries and keys. span: this transformer's token pruning.
        model: the transformer. RuntimeError where a forward is run again that cannot be.
        """
        self._again = None
        if in_backward():
            self._again = again.books(self.config, self.books)
        elif self.clock.tick(geometry, timestep, model):
            _forget(self)
            self.stateless_from, self._kept = None, 0
            self.books.forwards.clear()
        carried = carried and not geometry.fixed_order
        self.order.begin(geometry.grid, device, carried)
        where = self.clock if self._again is None else self.here
        self.place = Place(
            geometry,
            where.step,
            where.steps,
            where.passname,
            Reader(),
            self.order.index,
            None if carried else self.order.pair,
        )
        self.span, self._open = span, True
        if span is not None:
            span.begin(self.order.index if carried else None)
        if self._again is None:
            watch = Stopwatch(device)
            self.books.forwards.append(StepBook(self.clock.step, self.clock.passname, watch))

    def end(self, output: object = None) -> None:
        """The forward is over. output: what it returned."""
        self._open = False
        if self._again is None:
            book = self.books.forwards[-1]
            book.watch.stop()
            book.tokens = 1.0 if self.span is None else self.span.rows.share
        if self.span is not None:
            self.span.end()
        for tensor in differentiable(output) if torch.is_grad_enabled() else ():
            tensor.register_hook(partial(self._rewind, self.here))

    def _rewind(self, place: Place, gradient: Tensor) -> None:
        """The backward pass of a forward starts: what checkpoints run again stands there."""
        place.calls.clear()
        self.place = place

    def close(self) -> None:
        """The pipeline is given back: what still calls runs dense, and nothing is kept for it."""
        self._open, self.place, self._kept = False, None, state_bytes(self)
        _forget(self)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        dense: joint.Dense,
        gate: Tensor | None = None,
        shard: Shard = ALL,
    ) -> Tensor:
        """Attention of one layer. q, k, v, result [B, N, H, D] as diffusers has them.

        gate: see `gate`. shard: what this process has; of keys that go round what `rounds` allows.
        """
        if not self.running():
            return dense(q, k, v, mask)
        tokens, here, books = self.tokens(shard), self.here, self.running_books
        n = k.shape[1] if shard.ring is None else shard.ring.n
        if tokens.apart(q.shape[1], n):
            return dense(q, k, v, mask)
        number = here.number(layer)
        if self.span is not None:
            self.span.observer.watch_attention(q, k, mask)
            k, v, mask = self.span.keys((layer, number), k, v, mask)
            n = k.shape[1] if shard.ring is None else n  # with those of pruned tokens
        action = self.action(layer, shard.heads)
        obstacle = why_dense(self, tokens, q.shape[1], n, q.device)
        if self.config.method.stateful and not obstacle:
            rows = shard.rows or tokens.geometry.n_visual
            shape = (q.shape[0], q.shape[2], rows, q.shape[3])
            self.stateless_from = self._announce(shape, v.dtype, q.device)
        why = obstacle if action.keep is not None else action.reason
        order = None if self.pruned else here.order
        keys = why or here.keys.read(mask, n, tokens, order and order[0])
        if isinstance(keys, str):
            books.dense(layer, keys, planned=action.keep is None)
            return dense(q, k, v, mask)
        order = None if shard.rows is not None else order  # its queries came in that order
        given = (n, k.device)
        call = circumstances(self, layer, number, action, tokens, given, keys, scale, shard)
        call.dense = dense if self.backends else None
        with dispatch.recording() as used:
            out = joint.attend(
                self.config.method, q, k, v, mask, tokens, keys, order, call, dense, gate
            )
        books.served(used)
        return out

    def gate(self, layer: int, hidden: Tensor | None, heads: int) -> Tensor | None:
        """[B, N, H, D] that the method makes of what a layer's attention was given, or None."""
        if hidden is None:
            return None
        book = self.books.layers[layer]
        return self.config.method.gate(hidden, (book.part, book.number), heads)

    def running(self) -> bool:
        """Does the call come from a forward, or from a part of it that is run again?"""
        if self._open or self.place is None or not in_backward():
            return self._open
        self._again = self._again or again.books(self.config, self.books)
        return True

    @property
    def here(self) -> Place:
        """Where the forward at hand stands."""
        assert self.place is not None, "a forward runs"
        return self.place

    @property
    def running_books(self) -> Books:
        """Where the call at hand is written: what is run again was counted before."""
        return self._again or self.books

    @property
    def pruned(self) -> bool:
        """Does part of the tokens run just now?"""
        return self.span is not None and self.span.live is not None

    def tokens(self, shard: Shard) -> Tokens:
        """Those of a call of which this process has `shard`."""
        if shard.rows is not None:
            return Tokens(self.here.geometry, shard.rows, part=True)
        pruned = self.span.tokens() if self.span is not None else None
        return pruned or Tokens(self.here.geometry, self.here.geometry.n_visual)

    def action(self, layer: int, heads: tuple[int, ...] | None = None) -> Action:
        """What is planned for a layer now, or for some of its heads."""
        book = self.books.layers[layer]
        action = self.plans[book.part].action(self.here.step, self.here.steps, book.number)
        if heads is None or not isinstance(action.keep, tuple) or max(heads) >= len(action.keep):
            return action
        return action._replace(keep=tuple(action.keep[head] for head in heads))

    def bypass(self, layer: int, reason: str) -> None:
        """Book a dense call of `layer` that did not come through `attend`."""
        if self._open and self._again is None:
            action = self.action(layer)
            planned = action.keep is None
            self.books.dense(layer, action.reason if planned else reason, planned)


def state_bytes(engine: Engine) -> int:
    """Bytes of the tensors that methods and pruning keep between steps; of a pipeline that was
    given back, of those that they kept."""
    kept = (x for entry in engine.state.values() for x in entry.values())
    tensors = sum(x.nbytes for x in kept if isinstance(x, Tensor))
    return tensors + sum(map(nbytes, engine.spans)) or engine._kept


def _forget(engine: Engine) -> None:
    """What methods and pruning keep from forward to forward."""
    engine.state.clear()
    engine.together.clear()
    for span in engine.spans:
        span.forget()
