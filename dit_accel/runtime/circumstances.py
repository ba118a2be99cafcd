"""What a method is told of the attention call that it serves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from dit_accel.forward.keys import Keys, Tokens, text_blocks
from dit_accel.methods import Call
from dit_accel.schedule import Action

if TYPE_CHECKING:
    from dit_accel.runtime.engine import Engine


def circumstances(
    engine: Engine,
    layer: int,
    number: int,
    action: Action,
    tokens: Tokens,
    k: Tensor,
    keys: Keys,
    scale: float | None,
) -> Call:
    """Of call `number` of a layer in this forward. k [B, N, H, D]: its keys, as `keys` says."""
    assert action.keep is not None, "a planned dense call does not come here"
    here, book, size = engine.here, engine.books.layers[layer], engine.config.method.block_k
    blocks = (k.shape[1], tokens.geometry.n_visual, size, keys.text_first, k.device)
    forced, n_forced = text_blocks(*blocks)
    stateless = engine.stateless_from
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
        note=partial(engine.running_books.sparse, layer),
        sections=here.geometry.sections,
    )
