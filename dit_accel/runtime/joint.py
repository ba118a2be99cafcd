"""One attention call in two parts: visual queries by a method over all keys, text queries dense."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.forward.keys import Keys, Tokens
from dit_accel.methods import Call, Method, by_parts

Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(
    method: Method,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tokens: Tokens,
    keys: Keys,
    order: tuple[Tensor, Tensor] | None,
    call: Call,
    dense: Dense,
    gate: Tensor | None = None,
) -> Tensor:
    """q, k, v, gate, result [B, N, H, D].

    order: the order in which the visual queries are put, and what undoes it; keys: that of the
    keys. dense: the pipeline's own attention.
    """
    q, k, v = (x.to(v.dtype) for x in (q, k, v))  # some norms hand fp32 q, k with bf16 v
    visual, text = tokens.parts(q.shape[1], tokens.queries)
    whole = method.whole and keys.length is None and q.shape[1] == k.shape[1]
    if whole and (gate is None or gate.shape[1] == q.shape[1]):
        return _whole(method, q, k, v, visual, order, call, gate)
    if gate is not None:
        seen = gate[:, visual] if gate.shape[1] == q.shape[1] else gate
        seen = seen if order is None else seen.index_select(1, order[0])
        call = replace(call, gate=seen.transpose(1, 2))
    if call.ring is not None:
        rows, beside, k, v = (x.transpose(1, 2) for x in (q[:, visual], q[:, text], k, v))
        both = by_parts.attend(method, rows, beside, k, v, call, call.ring)
        parts = both[::-1] if text.start < visual.start else both
        return torch.cat([x.transpose(1, 2) for x in parts], 1)
    queries = q[:, visual] if order is None else q[:, visual].index_select(1, order[0])
    q_, k_, v_ = (x.transpose(1, 2) for x in (queries, keys.arrange(k), keys.arrange(v)))
    seen = method(q_, k_, v_, call).transpose(1, 2)
    seen = seen if order is None else seen.index_select(1, order[1])
    if text.start == text.stop:
        return seen
    out = torch.empty_like(q)
    out[:, visual] = seen
    if mask is not None and mask.ndim == 4 and mask.shape[2] > 1:  # it is a product
        mask = mask[:, :, text]
    out[:, text] = dense(q[:, text], k, v, mask)
    return out


def _whole(
    method: Method,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual: slice,
    order: tuple[Tensor, Tensor] | None,
    call: Call,
    gate: Tensor | None,
) -> Tensor:
    """All queries by the method."""
    given = [q, k, v] if gate is None else [q, k, v, gate]
    if order is not None:
        there, back = (_around(x, visual, q.shape[1]) for x in order)
        given = [x.index_select(1, there) for x in given]
    q, k, v, *rest = (x.transpose(1, 2) for x in given)
    call = replace(call, gate=rest[0]) if rest else call
    out = method(q, k, v, call).transpose(1, 2)
    return out if order is None else out.index_select(1, back)


def _around(order: Tensor, visual: slice, n: int) -> Tensor:
    """An order of the visual tokens as one of all n."""
    index = torch.arange(n, device=order.device)
    index[visual] = visual.start + order
    return index
