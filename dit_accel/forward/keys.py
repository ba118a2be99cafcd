"""Which keys are valid, and in which order the method is given them.

A mask that only hides padded keys needs no mask at all once the valid keys come first: attention
does not mind the order of its keys, so they are gathered and a length takes the mask's place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.machine import cached_tensors
from dit_accel.pipelines.base import Geometry


@dataclass(frozen=True)
class Keys:
    """The keys of one attention call.

    index: int64 [N] or [B, N], the order in which keys are gathered; None: as they come.
    length: valid keys (int, or int64 [B]); None when all are valid.
    text_first: the text keys come before the visual ones once arranged.
    """

    index: Tensor | None = None
    length: int | Tensor | None = None
    text_first: bool = False

    def arrange(self, x: Tensor) -> Tensor:
        """x [B, N, H, D] in this order."""
        if self.index is None:
            return x
        if self.index.ndim == 1:
            return x.index_select(1, self.index)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        return x[rows, self.index]


class Tokens(NamedTuple):
    """Which tokens a call of the running forward has.

    geometry: of its keys; a row of those that are seen where tokens are pruned. queries: how many
    of its queries are visual. part: the queries are those of one process of several.
    """

    geometry: Geometry
    queries: int
    part: bool = False

    def parts(self, n: int, n_visual: int) -> tuple[slice, slice]:
        """Where the visual and where the text tokens lie in a sequence of n."""
        if self.geometry.text_first:
            return slice(n - n_visual, n), slice(0, n - n_visual)
        return slice(0, n_visual), slice(n_visual, n)

    def apart(self, n_queries: int, n_keys: int) -> bool:
        """Is this another of the calls that make up the attention, not that of the picture?

        Adapters for reference images (IP-Adapter) let it attend to these in a call of its own.
        """
        g = self.geometry
        if n_keys != n_queries and n_keys < self.queries:
            return True
        whole = (self.queries, self.queries + (g.n_text or 0))
        return g.segments and (n_queries, n_keys) != whole

    def misfit(self, n_queries: int, n_keys: int) -> str:
        """Why a call with so many queries and keys cannot be this attention, or ""."""
        g = self.geometry
        fits = n_keys >= g.n_visual if g.n_text is None else n_keys == g.n_tokens
        text, all_text = n_queries - self.queries, n_keys - g.n_visual
        if fits and (0 <= text <= all_text if self.part else text in (0, all_text)):
            return ""
        return f"{n_queries} × {n_keys} tokens where the model's geometry says {g.n_tokens}"


class Reader:
    """Reads the keys of one forward's calls, each mask once."""

    def __init__(self) -> None:
        self._read: dict[Any, tuple[Tensor | None, Keys | str]] = {}

    def read(self, mask: Tensor | None, n: int, tokens: Tokens, order: Tensor | None) -> Keys | str:
        """The n keys behind this mask, or why it is not served. order: of the visual keys."""
        mask = narrow(mask)
        same = mask is None or tokens.geometry.same_mask
        which = (None if mask is None else mask.shape) if same else id(mask)
        name = (which, n, order is None)
        if name not in self._read:
            visual, _ = tokens.parts(n, tokens.geometry.n_visual)
            product = same and mask is not None and mask.ndim == 4 and mask.shape[2] > 1
            # the mask is held so that its id stays its own; one read by shape needs no holding
            self._read[name] = (None if same else mask, read(mask, n, visual, order, product))
        return self._read[name][1]


@cached_tensors(256)
def text_blocks(
    n: int, n_visual: int, size: int, text_first: bool, device: torch.device
) -> tuple[Tensor | None, int]:
    """Which blocks of `size` of n keys hold text (bool [Mk]), and how many; (None, 0) if none does.

    Every query reads them: Call.forced and n_forced.
    """
    if n == n_visual:
        return None, 0
    first = torch.arange(0, n, size, device="cpu")
    last = (first + size).clamp(max=n)
    text = first < n - n_visual if text_first else last > n_visual
    return text.to(device), int(text.sum())


def narrow(mask: Tensor | None) -> Tensor | None:
    """A mask [B, 1, 1, N] that was expanded over heads and queries, before that; others as is."""
    if mask is not None and mask.ndim == 4 and mask.stride(1) == mask.stride(2) == 0:
        return mask[:, :1, :1]
    return mask


def read(
    mask: Tensor | None, n: int, visual: slice, order: Tensor | None, product: bool
) -> Keys | str:
    """The keys of calls that have this mask, or why the mask cannot be served.

    Args:
        mask: bool [B, 1, 1, N] or [B, N], or [B, 1, N, N] where `product` says that it is the
            product of the valid queries and the valid keys; None when there is none.
        n: keys. visual: where the visual ones lie; no mask may hide one of them.
        order: int64 permutation of the visual keys, or None.

    Reads a mask's values on the host: one device synchronisation.
    """
    text_first = visual.start > 0
    index = None
    if order is not None:
        index = torch.arange(n, device=order.device)
        index[visual] = visual.start + order
    if mask is None:
        return Keys(index, None, text_first)
    if mask.dtype != torch.bool:
        return "the attention mask is an additive bias"
    rows = slice(visual.start, visual.start + 1) if product else slice(None)
    mask = mask[:, :, rows] if mask.ndim == 4 else mask
    mask = mask[:, None, None] if mask.ndim == 2 else mask
    if mask.ndim != 4 or mask.shape[1:] != (1, 1, n):
        return "the attention mask is more than key padding"
    valid = mask[:, 0, 0]
    lengths = valid.sum(-1)
    if not bool(valid[:, visual].all()):
        return "the attention mask hides visual tokens"
    padded = torch.arange(n, device=mask.device) < lengths[:, None]
    equal = len(set(lengths.tolist())) == 1
    length = int(lengths[0]) if equal else lengths
    if torch.equal(padded, valid):
        return Keys(index, None if equal and length == n else length, text_first)
    return Keys(_valid_first(valid, visual, order), length)


def _valid_first(valid: Tensor, visual: slice, order: Tensor | None) -> Tensor:
    """int64 [B, N]: the visual keys in `order`, then the valid text keys, then the others."""
    last = torch.full(valid.shape, 3, device=valid.device)
    last[valid] = 2
    last[:, visual] = 1
    index = torch.argsort(last, dim=1, stable=True)
    if order is not None:
        index[:, : order.numel()] = visual.start + order
    return index
