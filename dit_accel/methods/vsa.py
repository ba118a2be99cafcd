"""VSA, video sparse attention (arXiv 2505.13389): tiles of video chosen and stood for by means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import ops
from dit_accel.forward.order import Grid, inverse, token_order
from dit_accel.machine import cached_tensors
from dit_accel.methods.base import Call
from dit_accel.methods.learned import Learned
from dit_accel.table import BlockTable, kept_blocks

_PARTS = {"weight": "of the gate's projection [H·D, C]", "bias": "[H·D]"}


class Layout(NamedTuple):
    """How a sequence falls into tiles.

    bounds: int32 [M + 1], cumulative tokens of all tiles. tiles: those of the video, of M; clip:
    its tokens, of n. video: int32, the bounds of its tiles from 0. order: of the whole sequence,
    where its tokens do not come in tiles yet, and what undoes it; own: that of the clip alone.
    """

    bounds: Tensor
    tiles: slice
    clip: slice
    video: Tensor
    order: tuple[Tensor, Tensor] | None
    own: tuple[Tensor, Tensor] | None
    n: int


@dataclass(frozen=True)
class VSA(Learned):
    """Exact attention to the best 3-D tiles, and a gated coarse attention to the means of all.

    O_i = softmax over the kept tiles + g_i ⊙ Σ_m softmax_m(q̄_n·k̄_m/√D) v̄_m, means by the true
    number of tokens of a tile, g = W·x + b of the attention's own input x. Text, sound and
    references are tiles that every query reads, and their queries read all. A layer without learned
    weights has no coarse part. Tokens are laid out in tiles, and no other order is taken.

    Args:
        tile: (t, h, w) tokens of a tile, at most 128.
        weights: a .safetensors file of `save`; None is untrained.

    Raises ValueError for a value outside its range, and for weights of another form.
    """

    keep: float = 0.2
    tile: Grid = (4, 4, 4)

    chooses: ClassVar[bool] = False
    name: ClassVar[str] = "vsa"
    description: ClassVar[str] = "exact on the best 3-D tiles, plus a gated mean of every tile"
    paper: ClassVar[str] = "arXiv 2505.13389"
    finetuning: ClassVar[bool] = True
    gated: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    form: ClassVar[tuple[str, ...]] = ("tile",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(self.tile))
        if len(self.tile) != 3 or min(self.tile) < 1 or prod(self.tile) > 128:
            raise ValueError(f"tile is three sizes (t, h, w) ≥ 1 of at most 128, not {self.tile}")
        super().__post_init__()

    @property
    def block(self) -> int:
        """Tokens in a block of the kernels: the least that holds a tile."""
        return max(16, 1 << (prod(self.tile) - 1).bit_length())

    @property
    def parts(self) -> dict[str, str]:
        return _PARTS

    def check_layer(self, layer: int, parts: Mapping[str, Tensor]) -> None:
        for part, x in parts.items():
            if x.dim() != (2 if part == "weight" else 1):
                raise ValueError(
                    f"VSA's layers.{layer}.{part} has shape {list(x.shape)}, and is {_PARTS[part]}"
                )
        if "weight" not in parts:
            raise ValueError(f"VSA weights name a bias of layer {layer} without a weight")

    def check_head_dim(self, layer: int, parts: Mapping[str, Tensor], head_dim: int | None) -> None:
        rows = parts["weight"].shape[0]
        if head_dim is not None and rows % head_dim:
            raise ValueError(
                f"VSA's gate of layer {layer} has {rows} channels, which heads of {head_dim} do "
                "not divide; load the weights that were trained for it"
            )

    def fresh(self, heads: int, head_dim: int, width: int) -> dict[str, Tensor]:
        return {"weight": torch.zeros(heads * head_dim, width)}

    def idle(self, parts: Mapping[str, Tensor]) -> bool:
        return not any(x.requires_grad or bool(x.any()) for x in parts.values())

    def gate(self, hidden: Tensor, place: tuple[int, int], heads: int) -> Tensor | None:
        parts = self.at(place, hidden.device)
        if parts is None:
            return None
        weight, bias = parts["weight"].to(hidden.dtype), parts.get("bias")
        bias = None if bias is None else bias.to(hidden.dtype)
        return F.linear(hidden, weight, bias).unflatten(-1, (heads, -1))

    @property
    def layout(self) -> Grid:
        return self.tile

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        if isinstance(call.kv_len, int):  # the others are padding
            k, v = k[:, :, : call.kv_len], v[:, :, : call.kv_len]
        layout, gate = self._laid_out(call, q, k), call.gate
        if layout.order is None or layout.own is None:
            return self._attend(q, k, v, gate, layout, call)
        k, v = (x.index_select(2, layout.order[0]) for x in (k, v))
        there, back = layout.order if q.shape[2] == layout.n else layout.own
        q = q.index_select(2, there)
        gate = gate if gate is None else gate.index_select(2, there)
        return self._attend(q, k, v, gate, layout, call).index_select(2, back)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, layout: Layout, call: Call
    ) -> Tensor:
        scale = q.shape[3] ** -0.5 if call.scale is None else call.scale
        all_of_them = q.shape[2] == layout.n
        clip, tiles = (layout.clip, layout.tiles) if all_of_them else (slice(None), slice(None))
        q_mean = ops.tile_means(q, layout.bounds if all_of_them else layout.video)
        scores = q_mean @ ops.tile_means(k, layout.bounds).mT * scale
        coarse = None
        if gate is not None:
            coarse = scores.softmax(-1) @ ops.tile_means(v, layout.bounds)
        table = self._choose(scores[:, :, tiles].detach(), layout, call)
        seen = ops.ragged_attention(
            q[:, :, clip], k, v, table, layout.video, layout.bounds, scale,
            None if gate is None else gate[:, :, clip],
            None if coarse is None else coarse[:, :, tiles],
        )  # fmt: skip
        if seen.shape == q.shape:
            return seen
        return self._with_text(q, k, v, gate, coarse, seen, layout, scale)

    def _with_text(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        coarse: Tensor | None,
        seen: Tensor,
        layout: Layout,
        scale: float,
    ) -> Tensor:
        """The queries beside the clip read everything; the coarse part is theirs, too."""
        n, clip, tiles = q.shape[2], layout.clip, layout.tiles
        text, ends = (slice(0, clip.start), layout.bounds[: tiles.start + 1])
        if clip.start == 0:
            text = slice(clip.stop, n)
            ends = layout.bounds[tiles.stop :] - layout.bounds[tiles.stop]
        out = F.scaled_dot_product_attention(q[:, :, text], k, v, scale=scale)
        if gate is not None and coarse is not None:
            mine = coarse[:, :, : tiles.start] if clip.start else coarse[:, :, tiles.stop :]
            out = out + gate[:, :, text] * ops.of_tiles(mine, ends, out.shape[2]).to(out.dtype)
        return torch.cat([out, seen] if clip.start else [seen, out], 2)

    def _choose(self, scores: Tensor, layout: Layout, call: Call) -> BlockTable:
        """The tiles beside the clip, and the `keep` best of it."""
        count, tiles = len(layout.bounds) - 1, layout.tiles
        video = tiles.stop - tiles.start
        forced = None
        if video < count:
            forced = scores.new_ones(count, dtype=torch.bool)
            forced[tiles] = False
        keep = kept_blocks(call.keep, video) / count
        size = self.block
        table = ops.choose_blocks(
            scores, keep, video * size, count * size, size, size,
            forced=forced, max_forced=count - video,
        )  # fmt: skip
        call.note(table)
        return table

    def _laid_out(self, call: Call, q: Tensor, k: Tensor) -> Layout:
        n, clip = k.shape[2], 0 if call.grid is None else prod(call.grid)
        if not clip or q.shape[2] not in (n, clip) or isinstance(call.kv_len, Tensor):
            raise ValueError(
                f"VSA takes a clip's grid, queries of the clip or of all tokens, and prompts of "
                f"one length; not {q.shape[2]} queries, {n} keys and the grid {call.grid}"
            )
        beside = n - clip
        parts = call.sections if sum(call.sections) == beside else (beside,) * (beside > 0)
        laid = call.index is not None
        return tiles_of(call.grid, self.tile, self.block, parts, call.text_first, laid, q.device)


@cached_tensors(32)
def tiles_of(
    grid: Grid,
    tile: Grid,
    block: int,
    ahead: tuple[int, ...],
    text_first: bool,
    laid: bool,
    device: torch.device,
) -> Layout:
    """The tiles of a clip of `grid` tokens and of the sections of other tokens beside it.

    A section (text, sound, references) is cut into tiles of `block` tokens of its own. laid: the
    clip's tokens are in the order of the tiles already.
    """
    lengths = [_pieces(n, size) for n, size in zip(grid, tile, strict=True)]
    video = [a * b * c for a in lengths[0] for b in lengths[1] for c in lengths[2]]
    other = [size for n in ahead for size in _pieces(n, block)]
    n_text, n = sum(ahead), prod(grid)
    first = text_first and bool(other)
    sizes = [*other, *video] if first else [*video, *other]
    start, at = (len(other), n_text) if first else (0, 0)
    own = None if laid else token_order("tile", grid, tile)
    order = own
    if own is not None:
        order = torch.arange(n + n_text)
        order[at : at + n] = at + own
    return Layout(
        _bounds(sizes, device),
        slice(start, start + len(video)),
        slice(at, at + n),
        _bounds(video, device),
        None if order is None else (order.to(device), inverse(order).to(device)),
        None if own is None else (own.to(device), inverse(own).to(device)),
        n + n_text,
    )


def _pieces(n: int, size: int) -> list[int]:
    """n as pieces of `size`, the last one short."""
    return [min(size, n - i * size) for i in range(ceil(n / size))]


def _bounds(sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32)
