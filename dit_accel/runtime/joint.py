"""One attention call in two parts: visual queries by a method over all keys, text queries dense."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.forward.keys import Keys, Tokens
from dit_accel.methods import Call, Method

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
) -> Tensor:
    """q, k, v, result [B, N, H, D].

    order: the order in which the visual queries are put, and what undoes it; keys: that of the
    keys. dense: the pipeline's own attention.
    """
    q, k, v = (x.to(v.dtype) for x in (q, k, v))  # some norms hand fp32 q, k with bf16 v
    visual, text = tokens.parts(q.shape[1], tokens.queries)
    queries = q[:, visual] if order is None else q[:, visual].index_select(1, order[0])
    arranged = (x.transpose(1, 2) for x in (queries, keys.arrange(k), keys.arrange(v)))
    seen = method(*arranged, call).transpose(1, 2)
    seen = seen if order is None else seen.index_select(1, order[1])
    if text.start == text.stop:
        return seen
    out = torch.empty_like(q)
    out[:, visual] = seen
    product = mask is not None and mask.ndim == 4 and mask.shape[2] > 1
    out[:, text] = dense(q[:, text], k, v, mask[:, :, text] if product else mask)
    return out
