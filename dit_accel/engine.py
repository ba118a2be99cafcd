"""What happens at an attention call: plan lookup, then dense or the method; and the books of it.

One Engine per accelerated pipeline. It knows nothing of modules or processors (patch.py does): it
is given tensors and the dense function to fall back to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel import dispatch
from dit_accel.clock import Clock
from dit_accel.config import AccelConfig
from dit_accel.methods import Call
from dit_accel.order import inverse, token_order
from dit_accel.pipelines.base import Geometry
from dit_accel.schedule import Plan
from dit_accel.table import BlockTable

# Tokens below which dense attention is the faster one. cpu: `dit-accel bench --crossover` on two
# cores; cuda: not measured yet, set where launch overhead cannot matter.
CROSSOVER = {"cpu": 512, "cuda": 4096}

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass
class LayerBook:
    """What one layer (`number` in its transformer) did; `kept` sums over its sparse calls."""

    name: str
    number: int
    sparse: int = 0
    dense: int = 0
    kept: float | torch.Tensor = 0.0


@dataclass
class StepBook:
    """One transformer forward: where it stood, what its layers did, how long it took."""

    step: int
    passname: str
    watch: Stopwatch
    sparse: int = 0
    dense: int = 0
    kept: float | torch.Tensor = 0.0


class Stopwatch:
    """Seconds between `start` and `stop`: host clock, or CUDA events read only when asked for."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks = [self._mark()]

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self.marks.append(self._mark())

    @property
    def seconds(self) -> float | None:
        """None when the forward did not finish."""
        if len(self.marks) < 2:
            return None
        start, end = self.marks
        if not self.cuda:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3


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
    state: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    index: torch.Tensor | None = None
    back: torch.Tensor | None = None
    generation_start: int = 0
    _lengths: dict[int, tuple[torch.Tensor, Any]] = field(default_factory=dict)
    _forced: dict[tuple, dict[str, Any]] = field(default_factory=dict)

    def begin(self, geometry: Geometry, device: torch.device) -> None:
        """A transformer forward starts: move the clock, drop stale state, choose the order."""
        if self.clock.tick(geometry):
            self.state.clear()
            self._forced.clear()
            self.generation_start = len(self.forwards)
        self._lengths.clear()
        self._order(geometry)
        book = StepBook(self.clock.step, self.clock.passname, Stopwatch(device))
        self.forwards.append(book)

    def end(self) -> None:
        """The forward is over."""
        self.forwards[-1].watch.stop()

    def _order(self, geometry: Geometry) -> None:
        kind = "raster" if geometry.fixed_order else self.config.order
        self.index = token_order(kind, geometry.grid, self.config.tile)
        self.back = None if self.index is None else inverse(self.index)

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
        action = self.plan.action(self.clock.step, self.clock.steps, self.layers[layer].number)
        planned = action.keep is None
        reason = action.reason if planned else self._obstacle(q, k, mask)
        if reason:
            self._book_dense(layer, reason, planned)
            return dense(q, k, v, mask)
        q, k, v = (x.to(v.dtype) for x in (q, k, v))  # some norms hand fp32 q, k with bf16 v
        call = self._call(layer, action, k, mask, scale)
        with dispatch.recording() as used:
            out = self._joint(q, k, v, mask, call, dense)
        for name in used:
            self.implementations[name] = self.implementations.get(name, 0) + 1
        return out

    def _obstacle(self, q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> str:
        """Why this call must be dense, or ""."""
        n, geometry = q.shape[1], self.clock.geometry
        if k.shape[1] != n or n != geometry.n_tokens:
            return f"{n} × {k.shape[1]} tokens where the model's geometry says {geometry.n_tokens}"
        least = self.config.min_tokens
        least = CROSSOVER.get(q.device.type, 0) if least is None else least
        if n < least:
            return f"{n} tokens are fewer than the crossover of {least}"
        if mask is not None and self._length(mask) is None:
            return "the attention mask is more than key padding"
        return ""

    def _length(self, mask: torch.Tensor) -> int | torch.Tensor | None:
        """Valid keys of a (B, 1, 1, N) boolean mask whose False part is a suffix; else None.

        Read once per forward and mask: it costs a device synchronisation.
        """
        if id(mask) not in self._lengths:
            self._lengths[id(mask)] = (mask, _suffix_length(mask))
        return self._lengths[id(mask)][1]

    def _call(
        self,
        layer: int,
        action: Any,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> Call:
        clock = self.clock

        def note(table: BlockTable) -> None:
            kept = table.density()
            for book in (self.layers[layer], self.forwards[-1]):
                book.sparse += 1
                book.kept = book.kept + kept

        return Call(
            keep=action.keep,
            scale=scale,
            grid=clock.geometry.grid,
            **self._text_blocks(k),
            kv_len=None if mask is None else self._length(mask),
            layer=self.layers[layer].number,
            step=clock.step,
            steps=clock.steps,
            passname=clock.passname,
            refresh=action.refresh,
            state=self.state.setdefault((clock.passname, layer), {}),
            note=note,
        )

    def _text_blocks(self, k: torch.Tensor) -> dict[str, Any]:
        """The key blocks that hold text, which every query reads: Call.forced and n_forced."""
        g, size = self.clock.geometry, self.config.method.block_k
        if not g.n_text:
            return {}
        key = (g, size, k.device)
        if key not in self._forced:
            first = torch.arange(0, g.n_tokens, size)
            last = (first + size).clamp(max=g.n_tokens)
            text = first < g.n_text if g.text_first else last > g.n_visual
            self._forced[key] = {"forced": text.to(k.device), "n_forced": int(text.sum())}
        return self._forced[key]

    def _joint(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        call: Call,
        dense: Dense,
    ) -> torch.Tensor:
        """Visual queries by the method over all keys; text queries, if any, dense."""
        g = self.clock.geometry
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        if not g.n_text:
            return self.config.method(*heads_first, call).transpose(1, 2)
        visual, text = (slice(g.n_text, None), slice(0, g.n_text))
        if not g.text_first:
            visual, text = slice(0, g.n_visual), slice(g.n_visual, None)
        out = torch.empty_like(q)
        out[:, visual] = self.config.method(
            heads_first[0][:, :, visual], *heads_first[1:], call
        ).transpose(1, 2)
        out[:, text] = dense(q[:, text], k, v, mask)
        return out

    def state_bytes(self) -> int:
        """Bytes of the tensors that methods keep between steps."""
        tensors = (x for entry in self.state.values() for x in entry.values())
        return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))

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


def _suffix_length(mask: torch.Tensor) -> int | torch.Tensor | None:
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        return None
    valid = mask[:, 0, 0]
    lengths = valid.sum(-1)
    suffix = torch.arange(valid.shape[1], device=mask.device) < lengths[:, None]
    if not torch.equal(suffix, valid) or bool((lengths == 0).any()):
        return None
    return int(lengths[0]) if len(set(lengths.tolist())) == 1 else lengths
