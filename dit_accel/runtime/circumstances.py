"""What a method is told of the attention call that it serves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.config import CROSSOVER
from dit_accel.forward.keys import Keys, Tokens, text_blocks
from dit_accel.methods import Call
from dit_accel.parallel.level import Held, dealt, in_turn
from dit_accel.parallel.sharded import ALL, Shard
from dit_accel.runtime.interception import interceptor
from dit_accel.schedule import Action

if TYPE_CHECKING:
    from dit_accel.runtime.engine import Engine


def circumstances(
    engine: Engine,
    layer: int,
    number: int,
    action: Action,
    tokens: Tokens,
    given: tuple[int, torch.device],
    keys: Keys,
    scale: float | None,
    shard: Shard,
) -> Call:
    """Of call `number` of a layer in this forward. given: how many keys it has, and where."""
    assert action.keep is not None, "a planned dense call does not come here"
    here, book, size = engine.here, engine.books.layers[layer], engine.config.method.block_k
    blocks = (given[0], tokens.geometry.n_visual, size, keys.text_first, given[1])
    forced, n_forced = text_blocks(*blocks)
    stateless = engine.stateless_from
    # beside what layers keep, which are counted from 0
    layers = engine.together.setdefault((-1 - book.part, number), {})
    return Call(
        keep=action.keep,
        scale=scale,
        grid=None if engine.pruned else here.geometry.grid,
        forced=forced,
        n_forced=n_forced,
        text_first=keys.text_first,
        index=None if engine.pruned else here.index,
        kv_len=keys.length,
        layer=book.number,
        part=book.part,
        layers=engine.plans[book.part].sparse_layers(),
        step=here.step,
        steps=here.steps,
        passname=here.passname,
        refresh=action.refresh,
        stateless=stateless is not None and book.number >= stateless,
        state=engine.state.setdefault((here.passname, (layer, number)), {}),
        together=engine.together.setdefault((layer, number), {}),
        across=layers.setdefault(here.passname, {}),
        note=partial(engine.running_books.sparse, layer),
        sections=here.geometry.sections,
        first=shard.first,
        queries=shard.queries,
        heads=shard.heads,
        ring=shard.ring,
    )


def held(engine: Engine, layer: int, heads: int, ranks: int) -> Held:
    """The heads of a layer that each of `ranks` processes has, level in their budgets: the same at
    every step, for what a layer remembers is by its heads."""
    book = engine.books.layers[layer]
    budget = engine.plans[book.part].budget(book.number)
    if budget is None or len(budget) != heads:
        return in_turn(heads, ranks)
    return dealt(budget, ranks)


def why_dense(engine: Engine, tokens: Tokens, queries: int, n: int, device: torch.device) -> str:
    """Why a call of so many queries and n keys must be dense, or ""."""
    least = engine.config.min_tokens
    why = tokens.geometry.dense or tokens.misfit(queries, n)
    if not why and (mode := interceptor()):
        return f"{mode} intercepts attention"
    least = CROSSOVER.get(device.type, 0) if least is None else least
    if not why and n < least:
        return f"{n} tokens are fewer than the crossover of {least}"
    return why


def rounds(engine: Engine, layer: int, mask: Tensor | None, n: int, device: torch.device) -> bool:
    """Can the n keys of a layer's call go round in parts: is it sparse, by a method that merges
    them, and are all of them valid?"""
    if not engine.running() or engine.pruned or engine.action(layer).keep is None:
        return False
    tokens, order = engine.tokens(ALL), engine.here.order
    if not engine.config.method.by_parts or why_dense(engine, tokens, tokens.queries, n, device):
        return False
    keys = engine.here.keys.read(mask, n, tokens, order and order[0])
    return not isinstance(keys, str) and keys.length is None
