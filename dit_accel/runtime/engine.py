"""What happens at an attention call: plan lookup, then dense or the method; and the books of it.

One Engine per accelerated pipeline. It knows nothing of modules or processors (patch.py does): it
is given tensors and the dense function to fall back to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel.config import CROSSOVER, AccelConfig
from dit_accel.forward import keys
from dit_accel.forward.clock import Clock
from dit_accel.forward.keys import Keys
from dit_accel.forward.order import inverse, token_order
from dit_accel.machine import Stopwatch
from dit_accel.methods import Call
from dit_accel.ops import dispatch
from dit_accel.pipelines.base import Geometry
from dit_accel.pruning.span import Span
from dit_accel.runtime.books import LayerBook, StepBook
from dit_accel.runtime.state import Announcer
from dit_accel.schedule import Plan
from dit_accel.table import BlockTable

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass
class Engine:
    """The state of an accelerated pipeline; dies with it.

    `begin` opens a transformer forward, `attend` serves each attention call in it, `end` closes it.
    """

    config: AccelConfig
    plan: Plan
    clock: Clock
    layers: list[LayerBook] = field(default_factory=list)
    forwards: list[StepBook] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    unplanned: set[str] = field(default_factory=set)
    implementations: dict[str, int] = field(default_factory=dict)
    state: dict[tuple[str, tuple[int, int]], dict[str, Any]] = field(default_factory=dict)
    index: torch.Tensor | None = None
    back: torch.Tensor | None = None
    carried: bool = False
    span: Span | None = None
    spans: list[Span] = field(default_factory=list)
    stateless_from: int | None = None
    _ordered: tuple[str, tuple[int, int, int], torch.device] | None = None
    _announce: Announcer = field(default_factory=Announcer)
    _keys: dict[Any, tuple[torch.Tensor | None, Keys | str]] = field(default_factory=dict)
    _forced: dict[tuple, dict[str, Any]] = field(default_factory=dict)
    _calls: dict[int, int] = field(default_factory=dict)

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
        if self.clock.tick(geometry, timestep):
            self.state.clear()
            self.stateless_from = None
            self._forced.clear()
            self.forwards.clear()
        self._keys.clear()
        self._calls.clear()
        self._order(geometry, device, carried and not geometry.fixed_order)
        self.span = span
        if span is not None:
            span.begin(self.index if self.carried else None)
        book = StepBook(self.clock.step, self.clock.passname, Stopwatch(device))
        self.forwards.append(book)

    def end(self) -> None:
        """The forward is over."""
        self.forwards[-1].watch.stop()
        if self.span is not None:
            self.forwards[-1].tokens = self.span.share
            self.span.end()

    @property
    def _pruned(self) -> bool:
        return self.span is not None and self.span.live is not None

    @property
    def geometry(self) -> Geometry:
        """The keys of the call at hand: a row of those that are seen where tokens are pruned."""
        g = self.clock.geometry
        return g._replace(grid=(1, 1, self.span.visual_keys)) if self._pruned else g

    @property
    def _queries(self) -> int:
        """The visual queries of the call at hand."""
        return self.span.queries if self._pruned else self.geometry.n_visual

    def _order(self, geometry: Geometry, device: torch.device, carried: bool) -> None:
        lines = sum(n > 1 for n in geometry.grid) < 2  # a row of tokens has one order only
        kind = "raster" if lines else self.config.order
        wanted = (kind, geometry.grid, device)
        if wanted != self._ordered:  # a copy to the device waits for it: not once per forward
            index = token_order(kind, geometry.grid, self.config.tile)
            self.index = None if index is None else index.to(device)
            self.back = None if index is None else inverse(index).to(device)
            self._ordered = wanted
        self.carried = carried

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        dense: Dense,
    ) -> torch.Tensor:
        """Attention of one layer. q, k, v, result [B, N, H, D] as diffusers has them."""
        if not self.forwards:  # a module called outside of its transformer's forward
            return dense(q, k, v, mask)
        g = self.clock.geometry
        if g.segments and (q.shape[1], k.shape[1]) != (self._queries, self._queries + g.n_text):
            return dense(q, k, v, mask)
        number = self._calls.get(layer, 0)  # some models call once per sample of the batch
        self._calls[layer] = number + 1
        if self.span is not None:
            self.span.observer.watch_attention(q, k, mask)
            k, v, mask = self.span.keys((layer, number), k, v, mask)
        action = self.plan.action(self.clock.step, self.clock.steps, self.layers[layer].number)
        planned = action.keep is None
        reason = action.reason if planned else self._obstacle(q, k)
        if self.config.method.stateful and not self._obstacle(q, k):
            self._announce(self, q, v)
        keyed = reason if reason else self._read_keys(mask, k.shape[1])
        if isinstance(keyed, str):
            reason = keyed
            self._book_dense(layer, reason, planned)
            return dense(q, k, v, mask)
        q, k, v = (x.to(v.dtype) for x in (q, k, v))  # some norms hand fp32 q, k with bf16 v
        call = self._call(layer, number, action, k, keyed, scale)
        with dispatch.recording() as used:
            out = self._joint(q, k, v, mask, call, keyed, dense)
        for name in used:
            self.implementations[name] = self.implementations.get(name, 0) + 1
        return out

    def _obstacle(self, q: torch.Tensor, k: torch.Tensor) -> str:
        """Why this call must be dense, or ""."""
        n, geometry = k.shape[1], self.geometry
        if geometry.dense:
            return geometry.dense
        fits = n >= geometry.n_visual if geometry.n_text is None else n == geometry.n_tokens
        if q.shape[1] - self._queries not in (0, n - geometry.n_visual) or not fits:
            return f"{q.shape[1]} × {n} tokens where the model's geometry says {geometry.n_tokens}"
        least = self.config.min_tokens
        least = CROSSOVER.get(q.device.type, 0) if least is None else least
        if n < least:
            return f"{n} tokens are fewer than the crossover of {least}"
        return ""

    def _parts(self, n: int, n_visual: int) -> tuple[slice, slice]:
        """Where the visual and where the text tokens lie in a sequence of n."""
        if self.geometry.text_first:
            return slice(n - n_visual, n), slice(0, n - n_visual)
        return slice(0, n_visual), slice(n_visual, n)

    def _read_keys(self, mask: torch.Tensor | None, n: int) -> Keys | str:
        """The keys behind this mask, read once per forward and mask, or why it is not served."""
        mask = keys.narrow(mask)
        same = mask is None or self.geometry.same_mask
        name = (None if mask is None else mask.shape, n) if same else id(mask)
        if name not in self._keys:
            order = None if self.carried or self._pruned else self.index
            product = same and mask is not None and mask.ndim == 4 and mask.shape[2] > 1
            visual, _ = self._parts(n, self.geometry.n_visual)
            found = keys.read(mask, n, visual, order, product)
            # the mask is held so that its id stays its own; one read by shape needs no holding
            self._keys[name] = (None if same else mask, found)
        return self._keys[name][1]

    def _call(
        self,
        layer: int,
        number: int,
        action: Any,
        k: torch.Tensor,
        keyed: Keys,
        scale: float | None,
    ) -> Call:
        clock, place = self.clock, self.layers[layer].number

        def note(table: BlockTable | None) -> None:
            kept = 1.0 if table is None else table.density()
            for book in (self.layers[layer], self.forwards[-1]):
                book.sparse += 1
                book.kept = book.kept + kept

        return Call(
            keep=action.keep,
            scale=scale,
            grid=None if self._pruned else clock.geometry.grid,
            **self._text_blocks(k, keyed),
            text_first=keyed.text_first,
            index=None if self._pruned else self.index,
            kv_len=keyed.length,
            layer=place,
            layers=self.plan.sparse_layers(),
            step=clock.step,
            steps=clock.steps,
            passname=clock.passname,
            refresh=action.refresh,
            stateless=self.stateless_from is not None and place >= self.stateless_from,
            state=self.state.setdefault((clock.passname, (layer, number)), {}),
            note=note,
        )

    def _text_blocks(self, k: torch.Tensor, keyed: Keys) -> dict[str, Any]:
        """The key blocks that hold text, which every query reads: Call.forced and n_forced."""
        n, n_visual = k.shape[1], self.geometry.n_visual
        size = self.config.method.block_k
        if n == n_visual:
            return {}
        key = (n, n_visual, size, keyed.text_first, k.device)
        if key not in self._forced:
            first = torch.arange(0, n, size)
            last = (first + size).clamp(max=n)
            text = first < n - n_visual if keyed.text_first else last > n_visual
            self._forced[key] = {"forced": text.to(k.device), "n_forced": int(text.sum())}
        return self._forced[key]

    def _joint(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        call: Call,
        keyed: Keys,
        dense: Dense,
    ) -> torch.Tensor:
        """Visual queries by the method over all keys; text queries, if any, dense."""
        visual, text = self._parts(q.shape[1], self._queries)  # perhaps no text queries at all
        permuted = not (self.index is None or self.carried or self._pruned)
        queries = q[:, visual]
        queries = queries.index_select(1, self.index) if permuted else queries
        arranged = (queries, keyed.arrange(k), keyed.arrange(v))
        seen = self.config.method(*(x.transpose(1, 2) for x in arranged), call).transpose(1, 2)
        seen = seen.index_select(1, self.back) if permuted else seen
        if text.start == text.stop:
            return seen
        out = torch.empty_like(q)
        out[:, visual] = seen
        product = mask is not None and mask.ndim == 4 and mask.shape[2] > 1
        rows = mask[:, :, text] if product else mask
        out[:, text] = dense(q[:, text], k, v, rows)
        return out

    def bypass(self, layer: int, reason: str) -> None:
        """Book a dense call of `layer` that did not come through `attend`."""
        if self.forwards:
            action = self.plan.action(self.clock.step, self.clock.steps, self.layers[layer].number)
            planned = action.keep is None
            self._book_dense(layer, action.reason if planned else reason, planned)

    def state_bytes(self) -> int:
        """Bytes of the tensors that methods keep between steps."""
        tensors = (x for entry in self.state.values() for x in entry.values())
        kept = sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))
        return kept + sum(span.nbytes() for span in self.spans)

    def _book_dense(self, layer: int, reason: str, planned: bool) -> None:
        if not planned and self.config.strict:
            raise RuntimeError(
                f"layer {self.layers[layer].name} cannot run sparse: {reason}; "
                "call accelerate with strict=False to let it run dense"
            )
        if not planned:
            self.unplanned.add(reason)
        self.layers[layer].dense += 1
        self.forwards[-1].dense += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
