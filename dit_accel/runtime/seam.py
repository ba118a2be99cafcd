"""The door between a diffusers processor and its Engine, in eager code and under torch.compile.

A processor re-bound by patch.py calls `attend_bnhd` or `attend_bhnd` where it called diffusers'
dispatcher or SDPA. Which layer is calling travels as a 0-d tensor: a Python int would be a guard,
and each layer would compile anew. Under compile the whole decision sits in one opaque operator.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.parallel import sharded, ulysses
from dit_accel.parallel.context import config_of, is_ring, obstacle
from dit_accel.parallel.sharded import ALL, Shard
from dit_accel.runtime.circumstances import held, rounds
from dit_accel.runtime.engine import Engine
from dit_accel.runtime.interception import interceptor

if TYPE_CHECKING:
    from diffusers.models._modeling_parallel import ParallelConfig


@dataclass(eq=False)
class Layer:
    """One patched attention module: its number in the engine and its own dense function.

    processor: the one that calls us. original: that which it stands for; None where it is the same
    object. dispatch: diffusers' dispatch_attention_fn, or None for processors that call SDPA.
    number: int64 [], by which the layer is found; on the CPU, where reading it waits for nothing.
    gated: the method wants what the module was given, too.
    """

    engine: Engine
    index: int
    processor: object = None
    original: object = None
    dispatch: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        identity = next(_IDS)
        _LAYERS[identity] = self
        with torch.inference_mode(False):
            self.number = torch.tensor(identity, device="cpu")
        self.gated = type(self) is Layer and self.engine.config.method.reads_input

    def __reduce__(self) -> tuple[object, ...]:
        """A copy has a number of its own, and the copy of the engine."""
        rest = {name: getattr(self, name) for name in ("processor", "original", "dispatch")}
        return type(self), (self.engine, self.index), rest

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        hidden: Tensor | None,
    ) -> Tensor:
        """q, k, v, result [B, N, H, D]; hidden: what the module was given, for a gated method."""
        shared, place = config_of(self.processor), self.engine.place

        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return self.dense(q, k, v, mask, scale, None)

        def decide(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            mask: Tensor | None,
            gate: Tensor | None = None,
            shard: Shard = ALL,
        ) -> Tensor:
            return self.engine.attend(self.index, q, k, v, mask, scale, dense, gate, shard)

        if shared is not None and is_ring(shared):
            return self._in_ring(q, k, v, mask, scale, shared, decide)
        gate = self.engine.gate(self.index, hidden, q.shape[2])
        if shared is None:
            return decide(q, k, v, mask, gate)
        why = obstacle(shared, mask)
        if why or place is None:
            self.engine.bypass(self.index, why)
            return self.dense(q, k, v, mask, scale, shared)
        rank, ranks = ulysses.place(shared)
        by_rank = held(self.engine, self.index, q.shape[2], ranks)
        mine = partial(decide, shard=Shard(heads=by_rank[rank]))
        geometry = place.geometry

        def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
            return ulysses.gathered(q, k, v, mask, shared, geometry, mine, gate)

        return ulysses.dealt(q, k, v, gate, sum(by_rank, ()), run)

    def _in_ring(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        shared: ParallelConfig,
        decide: Callable[..., Tensor],
    ) -> Tensor:
        """The attention of this process's queries to the keys of all; see parallel.sharded."""
        engine, place = self.engine, self.engine.place
        why = obstacle(shared, mask)
        if why or place is None or place.geometry.segments or q.shape[1] != k.shape[1]:
            engine.bypass(self.index, why or "its tokens are not one sequence")
            return self.dense(q, k, v, mask, scale, shared)
        method, order = engine.config.method, place.order and place.order[0]
        sizes = (method.query_block(place.geometry.n_visual), method.block_k)
        why = sharded.obstacle(method.serves_rows, method.label, place.geometry, sizes[0], shared)
        if why:
            engine.bypass(self.index, why)
            run = partial(self.dense, scale=scale, shared=None)
            return sharded.dense(q, k, v, mask, shared, place.geometry, run)
        go_round = partial(rounds, engine, self.index, device=q.device)
        return sharded.attended(
            q, k, v, mask, shared, place.geometry, order, sizes, decide, go_round
        )

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        shared: ParallelConfig | None,
    ) -> Tensor:
        """Dense attention, by the backend of the configuration or by the user's own. `shared`: its
        ParallelConfig where q, k, v are this rank's part of the tokens, None where they are all."""
        backends = self.engine.backends
        if backends is not None and shared is None:
            return backends(q, k, v, mask, scale, partial(self._own, shared=None))
        return self._own(q, k, v, mask, scale, shared)

    def _own(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        shared: ParallelConfig | None,
    ) -> Tensor:
        """The attention that this module had before."""
        if self.dispatch is None:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            return out.transpose(1, 2)
        return self.dispatch(
            q,
            k,
            v,
            attn_mask=mask,
            scale=scale,
            backend=getattr(self.processor, "_attention_backend", None),
            parallel_config=shared,
        )


class Reader(Layer):
    """An attention module that is not accelerated, but has visual tokens as its keys."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float | None,
        hidden: Tensor | None,
    ) -> Tensor:
        """Dense, over the keys that a pruned span's context completes."""
        if self.engine.span is not None:
            k, v, mask = self.engine.span.keys(("reader", int(self.number)), k, v, mask)
        return self.dense(q, k, v, mask, scale, config_of(self.processor))


# An address book, not state: layers are owned by their pipeline's patch and vanish with it.
_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_IDS = itertools.count()


class Call:
    """What a processor tells the call that it is about to make."""

    def __init__(self) -> None:  # Dynamo guards on which attributes there are
        self.layer: Tensor | None = None
        self.hidden: Tensor | None = None


class _Current(threading.local):
    """The call of each thread: an object inside, for where a graph ends Dynamo writes attributes
    past `threading.local`, so that nobody would find them."""

    def __init__(self) -> None:
        self.call = Call()


CURRENT = _Current()


def _current() -> Layer:
    layer = CURRENT.call.layer
    assert layer is not None, "a processor of ours runs"
    return _LAYERS[int(layer)]


def attend_bnhd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """The current layer's attention, tensors [B, N, H, D]."""
    call = CURRENT.call
    hidden, call.hidden = call.hidden, None
    if torch.compiler.is_compiling():
        trained = any(x.requires_grad for x in (q, k, v)) and torch.is_grad_enabled()
        attend = _attend_eagerly if trained else torch.ops.dit_accel.attend
        return attend(q, k, v, call.layer, mask, scale, hidden)
    return _current().attend(q, k, v, mask, scale, hidden)


@torch.compiler.disable(
    reason="the gradient of sparse attention is eager code: compile without fullgraph=True to train"
)
def _attend_eagerly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Tensor,
    mask: Tensor | None,
    scale: float | None,
    hidden: Tensor | None,
) -> Tensor:
    return _LAYERS[int(layer)].attend(q, k, v, mask, scale, hidden)


def attend_bhnd(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """The current layer's attention, tensors [B, H, N, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend_bnhd(q, k, v, mask, scale).transpose(1, 2)


def bypassed() -> None:
    """Book that the current layer made a call we do not serve. Code being compiled can't book."""
    if not torch.compiler.is_compiling():
        layer = _current()
        layer.engine.bypass(
            layer.index, "the call is causal, has dropout, a block mask or fewer key heads"
        )


def traced_away() -> bool:
    """Is code compiled under a mode that intercepts attention, and that is gone at run time?"""
    return torch.compiler.is_compiling() and bool(interceptor())


_TAGS = tuple(t for t in (getattr(torch._C.Tag, "cudagraph_unsafe", None),) if t is not None)


@torch.library.custom_op("dit_accel::attend", mutates_args=(), tags=_TAGS)
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: Tensor,
    mask: Tensor | None,
    scale: float | None,
    hidden: Tensor | None,
) -> Tensor:
    out = _LAYERS[int(layer)].attend(q, k, v, mask, scale, hidden).contiguous()
    return out.clone() if out.data_ptr() in (q.data_ptr(), k.data_ptr(), v.data_ptr()) else out


@_attend.register_fake
def _(q, k, v, layer, mask, scale, hidden):
    return v.new_empty((*q.shape[:3], v.shape[3]))
