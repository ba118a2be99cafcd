"""What happens at an attention call: plan lookup, then dense or the method.

One Engine per accelerated pipeline. It knows nothing of modules or processors (patch.py does): it
is given tensors and the dense function to fall back to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dit_accel.config import CROSSOVER, AccelConfig
from dit_accel.forward.clock import Clock
from dit_accel.forward.keys import Keys, Reader, Tokens
from dit_accel.forward.order import Order
from dit_accel.machine import Stopwatch
from dit_accel.methods import Call
from dit_accel.ops import dispatch
from dit_accel.pipelines.base import Geometry
from dit_accel.pruning.span import Span
from dit_accel.runtime import joint
from dit_accel.runtime.books import Books, StepBook
from dit_accel.runtime.state import Announcer
from dit_accel.schedule import Action, Plan


@dataclass
class Engine:
    """The state of an accelerated pipeline; dies with it.

    `begin` opens a transformer forward, `attend` serves each attention call in it, `end` closes it.

    config, plan, clock: how, when, and where the generation stands.
    books: what is counted.
    order: of the tokens.
    state: (pass, (layer, call)) → what the method keeps there.
    span: the token pruning of the transformer that runs.
    spans: of each transformer.
    stateless_from: the first layer whose state finds no room, or None.
    """

    config: AccelConfig
    plan: Plan
    clock: Clock
    books: Books = field(init=False)
    order: Order = field(init=False)
    state: dict[tuple[str, tuple[int, int]], dict[str, Any]] = field(default_factory=dict)
    together: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    span: Span | None = None
    spans: list[Span] = field(default_factory=list)
    stateless_from: int | None = None
    _keys: Reader = field(default_factory=Reader)
    _calls: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.books = Books(self.config.strict)
        self.order = Order(self.config.order, self.config.tile)
        self._announce = Announcer(self.config.method, self.clock)

    def begin(
        self,
        geometry: Geometry,
        device: torch.device,
        carried: bool = False,
        span: Span | None = None,
        timestep: Any = None,
    ) -> None:
        """A transformer forward starts: move the clock, drop stale state, choose the order.

        carried: the adapter can carry permuted tokens through the whole model; otherwise each
        attention call permutes its own queries and keys. span: this transformer's token pruning.
        """
        fresh = self.clock.tick(geometry, timestep)
        if fresh:
            self.state.clear()
            self.together.clear()
            self.stateless_from = None
            self.books.forwards.clear()
        self._keys.begin(fresh)
        self._calls.clear()
        self.order.begin(geometry.grid, device, carried and not geometry.fixed_order)
        self.span = span
        if span is not None:
            span.begin(self.order.index if self.order.carried else None)
        watch = Stopwatch(device)
        self.books.forwards.append(StepBook(self.clock.step, self.clock.passname, watch))

    def end(self) -> None:
        """The forward is over."""
        book = self.books.forwards[-1]
        book.watch.stop()
        if self.span is not None:
            book.tokens = self.span.rows.share
            self.span.end()

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
        place: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """Attention of one layer. q, k, v, result [B, N, H, D] as diffusers has them.

        gate: see `gate`. place: (rank, ranks) where H is this rank's share of the heads.
        """
        if not self.books.forwards:  # a module called outside of its transformer's forward
            return dense(q, k, v, mask)
        tokens = self._tokens()
        if tokens.apart(q.shape[1], k.shape[1]):
            return dense(q, k, v, mask)
        number = self._number(layer)
        if self.span is not None:
            self.span.observer.watch_attention(q, k, mask)
            k, v, mask = self.span.keys((layer, number), k, v, mask)
        action, obstacle = self._action(layer, *place), self._obstacle(tokens, q, k)
        if not obstacle:
            self._check_memory(tokens, q, v)
        why = obstacle if action.keep is not None else action.reason
        order = None if self.order.carried or self._pruned else self.order.pair
        keys = why or self._keys.read(mask, k.shape[1], tokens, order and order[0])
        if isinstance(keys, str):
            self.books.dense(layer, keys, planned=action.keep is None)
            return dense(q, k, v, mask)
        call = self._call(layer, number, action, tokens, k, keys, scale)
        with dispatch.recording() as used:
            method = self.config.method
            out = joint.attend(method, q, k, v, mask, tokens, keys, order, call, dense, gate)
        self.books.served(used)
        return out

    def gate(self, layer: int, hidden: Tensor | None, heads: int) -> Tensor | None:
        """[B, N, H, D] that the method makes of what a layer's attention was given, or None."""
        if hidden is None:
            return None
        book = self.books.layers[layer]
        return self.config.method.gate(hidden, (book.part, book.number), heads)

    @property
    def _pruned(self) -> bool:
        return self.span is not None and self.span.live is not None

    def _tokens(self) -> Tokens:
        pruned = self.span.tokens() if self.span is not None else None
        geometry = self.clock.geometry
        return pruned or Tokens(geometry, geometry.n_visual)

    def _number(self, layer: int) -> int:
        """The how manieth call of this layer: some models call once per sample of the batch."""
        number = self._calls.get(layer, 0)
        self._calls[layer] = number + 1
        return number

    def _action(self, layer: int, rank: int = 0, ranks: int = 1) -> Action:
        number = self.books.layers[layer].number
        action = self.plan.action(self.clock.step, self.clock.steps, number)
        if not isinstance(action.keep, tuple) or ranks == 1:
            return action
        heads = len(action.keep) // ranks
        return action._replace(keep=action.keep[rank * heads : (rank + 1) * heads])

    def _obstacle(self, tokens: Tokens, q: Tensor, k: Tensor) -> str:
        """Why this call must be dense, or ""."""
        n, least = k.shape[1], self.config.min_tokens
        why = tokens.geometry.dense or tokens.misfit(q.shape[1], n)
        least = CROSSOVER.get(q.device.type, 0) if least is None else least
        if not why and n < least:
            return f"{n} tokens are fewer than the crossover of {least}"
        return why

    def _check_memory(self, tokens: Tokens, q: Tensor, v: Tensor) -> None:
        """Say what the method will keep, or refuse it, before the first step is made."""
        if self.config.method.stateful:
            sparse = set(self.plan.sparse_layers())
            layers = sorted(b.number for b in self.books.layers if b.number in sparse)
            shape = (q.shape[0], q.shape[2], tokens.geometry.n_visual, q.shape[3])
            self.stateless_from = self._announce(layers, shape, v.dtype, q.device)

    def _call(
        self,
        layer: int,
        number: int,
        action: Action,
        tokens: Tokens,
        k: Tensor,
        keys: Keys,
        scale: float | None,
    ) -> Call:
        clock, book, size = self.clock, self.books.layers[layer], self.config.method.block_k
        blocks = (k.shape[1], tokens.geometry.n_visual, size, keys.text_first, k.device)
        return Call(
            keep=action.keep,
            scale=scale,
            grid=None if self._pruned else clock.geometry.grid,
            **self._keys.text_blocks(*blocks),
            text_first=keys.text_first,
            index=None if self._pruned else self.order.index,
            kv_len=keys.length,
            layer=book.number,
            part=book.part,
            layers=self.plan.sparse_layers(),
            step=clock.step,
            steps=clock.steps,
            passname=clock.passname,
            refresh=action.refresh,
            stateless=self.stateless_from is not None and book.number >= self.stateless_from,
            state=self.state.setdefault((clock.passname, (layer, number)), {}),
            together=self.together.setdefault((layer, number), {}),
            note=partial(self.books.sparse, layer),
            sections=clock.geometry.sections,
        )

    def bypass(self, layer: int, reason: str) -> None:
        """Book a dense call of `layer` that did not come through `attend`."""
        if self.books.forwards:
            action = self._action(layer)
            planned = action.keep is None
            self.books.dense(layer, action.reason if planned else reason, planned)

    def state_bytes(self) -> int:
        """Bytes of the tensors that methods keep between steps."""
        tensors = (x for entry in self.state.values() for x in entry.values())
        kept = sum(x.nbytes for x in tensors if isinstance(x, Tensor))
        return kept + sum(span.nbytes() for span in self.spans)
