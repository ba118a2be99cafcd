"""The block table: which key blocks each query block reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def block_count(n: int, block: int) -> int:
    """Blocks that cover n tokens; the last one may be short."""
    return (n + block - 1) // block


def bit_words(blocks: int) -> int:
    """Words of 32 bits for a row of blocks: those of whole 128."""
    return 4 * block_count(blocks, 128)


Keep = float | tuple[float, ...]  # a share of the key blocks, or one for each head


def kept_blocks(keep: Keep, blocks: int) -> int:
    """max(1, ceil(keep · blocks)): the blocks that a share `keep` of them stands for; of one for
    each head the most."""
    # 0.2 * 35 is 7.000000000000001 in floating point, and means 7 blocks.
    share = max(keep) if isinstance(keep, tuple) else keep
    return max(1, math.ceil(share * blocks - 1e-6))


def table_width(
    keep: Keep, blocks: int, max_forced: int | None, mass: float = 0.0, max_near: int = 0
) -> int:
    """Columns of the table of the best blocks and at most max_forced forced ones (None: any).

    The n best of M shares hold at least n/M of their sum, so `mass` takes at most ⌊mass·M⌋ + 1.
    """
    extra = blocks if max_forced is None else max_forced
    best = max(kept_blocks(keep, blocks), math.floor(mass * blocks) + 1)
    return min(blocks, best + extra + max_near)


@dataclass(frozen=True)
class BlockMeans:
    """What was read of q and k to make a block table, for the operator that reads the table next.

    They belong to these very q, k and kv_len. A table never holds them: one that is kept for other
    tensors cannot bring the means of its own.

    Args:
        q, k: [B, H, Mq, D] and [B, H, Mk, D] float32, means over the valid tokens of each block;
            zero for a block without one.
        q_far, k_far: of these shapes in the dtype of the tokens, mean absolute deviations from
            the block's mean; None unless asked for.
        kv_len: number of valid keys, as given; None when all are.
    """

    q: Tensor
    k: Tensor
    q_far: Tensor | None = None
    k_far: Tensor | None = None
    kv_len: int | Tensor | None = None


@dataclass(frozen=True)
class BlockBits:
    """A table as bits, for an operator that asks of every block whether a row keeps it.

    Args:
        words: [B, H, Mq, bit_words(Mk)] int32; bit m % 32 of word m // 32 is 1 where the row keeps
            block m, and beyond the last block with a valid key, unless a tensor tells that.
        kv_len: number of valid keys, as given; None when all are.
    """

    words: Tensor
    kv_len: int | Tensor | None = None


@dataclass(frozen=True)
class BlockTable:
    """Key blocks read by each query block.

    Args:
        indices: [B, H, Mq, K] int32, key blocks in ascending order. A row's first `counts` entries
            are valid; the rest are padding that is safe to load (inside [0, Mk)).
        counts: [B, H, Mq] int32, valid entries of each row; 0 is allowed.
        block_q, block_k: tokens in a query and in a key block; the last block may be short.
        n_q, n_k: tokens, so Mq = ceil(n_q / block_q) and Mk = ceil(n_k / block_k).
        bits: the same, where known.
        uneven: rows are of unlike length by choice (a keep for each head, a mass, any mask), which
            kernels may ask without waiting for the device.

    Raises ValueError for shapes that do not fit together, TypeError for another dtype.
    """

    indices: Tensor
    counts: Tensor
    block_q: int
    block_k: int
    n_q: int
    n_k: int
    bits: BlockBits | None = None
    uneven: bool = False

    def __post_init__(self) -> None:
        if self.indices.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise TypeError(
                f"indices and counts are int32, not {self.indices.dtype} and {self.counts.dtype}; "
                "convert them with .int()"
            )
        if min(self.block_q, self.block_k, self.n_q, self.n_k) < 1:
            raise ValueError(
                f"block sizes and lengths are positive, not {self.block_q}, {self.block_k}, "
                f"{self.n_q}, {self.n_k}"
            )
        if self.indices.dim() != 4 or self.indices.shape[:3] != self.counts.shape:
            raise ValueError(
                "indices are [B, H, Mq, K] and counts [B, H, Mq], not "
                f"{tuple(self.indices.shape)} and {tuple(self.counts.shape)}"
            )
        if self.counts.shape[2] != self.query_blocks:
            raise ValueError(
                f"{self.n_q} queries in blocks of {self.block_q} need {self.query_blocks} rows, "
                f"but the table has {self.counts.shape[2]}"
            )
        words = (*self.counts.shape, bit_words(self.key_blocks))
        if self.bits is not None and self.bits.words.shape != words:
            raise ValueError(
                f"the bits of this table are words {list(words)}, not "
                f"{list(self.bits.words.shape)}: a table that is changed leaves them out"
            )

    @property
    def query_blocks(self) -> int:
        """Mq."""
        return block_count(self.n_q, self.block_q)

    @property
    def key_blocks(self) -> int:
        """Mk."""
        return block_count(self.n_k, self.block_k)

    def valid(self) -> Tensor:
        """[B, H, Mq, K] bool: the entries of `indices` that count."""
        columns = torch.arange(self.indices.shape[-1], device=self.indices.device)
        return columns < self.counts[..., None]

    def density(self) -> Tensor:
        """Kept share of the query-key block pairs: a 0-d float32 tensor on the table's device."""
        return self.counts.mean(dtype=torch.float32) / self.key_blocks

    def to_mask(self) -> Tensor:
        """[B, H, Mq, Mk] bool, True where the pair of blocks is kept."""
        mask = self.indices.new_zeros(*self.counts.shape, self.key_blocks + 1, dtype=torch.bool)
        kept = self.indices.long().masked_fill(~self.valid(), self.key_blocks)
        return mask.scatter(-1, kept, True)[..., :-1]

    def to_bits(self, live: int | None = None) -> Tensor:
        """The words of BlockBits, with `live` blocks that hold a valid key (None: all)."""
        mask, words = self.to_mask(), bit_words(self.key_blocks)
        mask[..., self.key_blocks if live is None else live :] = True
        mask = torch.nn.functional.pad(mask, (0, 32 * words - self.key_blocks), value=True)
        values = 1 << torch.arange(32, device=mask.device)
        return (mask.unflatten(-1, (words, 32)) * values).sum(-1).int()

    def union(self, other: BlockTable) -> BlockTable:
        """The pairs that either table keeps, of the same blocks; does not wait for the device."""
        blocks = self.key_blocks
        rows = (x.indices.masked_fill(~x.valid(), blocks) for x in (self, other))
        merged = torch.cat(tuple(rows), -1).sort(-1).values
        again = merged[..., 1:] == merged[..., :-1]
        merged[..., 1:].masked_fill_(again, blocks)
        merged = merged.sort(-1).values[..., :blocks]
        counts = (merged < blocks).sum(-1, dtype=torch.int32)
        indices = merged.clamp(max=blocks - 1).contiguous()
        sizes = (self.block_q, self.block_k, self.n_q, self.n_k)
        return BlockTable(indices, counts, *sizes, uneven=self.uneven or other.uneven)

    def rows(self, first: int, n_q: int) -> BlockTable:
        """The rows of the n_q queries from `first` on, where a block begins."""
        rows = slice(first // self.block_q, block_count(first + n_q, self.block_q))
        indices, counts = self.indices[:, :, rows], self.counts[:, :, rows]
        sizes = (self.block_q, self.block_k, n_q, self.n_k)
        return BlockTable(indices, counts, *sizes, uneven=self.uneven)

    def columns(self, first: int, n_k: int) -> BlockTable:
        """What it keeps of the n_k keys from `first` on, where a block begins, as a table of these;
        does not wait for the device."""
        start, blocks = first // self.block_k, block_count(n_k, self.block_k)
        here = self.indices - start
        kept = self.valid() & (here >= 0) & (here < blocks)
        here = here.masked_fill(~kept, blocks).sort(-1).values[..., :blocks]
        counts = kept.sum(-1, dtype=torch.int32)
        indices = here.clamp(max=blocks - 1).contiguous()
        sizes = (self.block_q, self.block_k, self.n_q, n_k)
        return BlockTable(indices, counts, *sizes, uneven=True)

    @classmethod
    def from_mask(
        cls, mask: Tensor, block_q: int, block_k: int, n_q: int, n_k: int, width: int | None = None
    ) -> BlockTable:
        """The table of a [B, H, Mq, Mk] bool mask, uneven.

        width: columns, at least the largest count (None: just that, which waits for the device).
        """
        blocks = block_count(n_k, block_k)
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[3] != blocks:
            raise ValueError(
                f"the mask is [B, H, Mq, {blocks}] bool for {n_k} keys in blocks of {block_k}, "
                f"not {tuple(mask.shape)} {mask.dtype}"
            )
        counts = mask.sum(-1, dtype=torch.int32)
        width = max(1, int(counts.max())) if width is None else width
        order = torch.sort(mask, dim=-1, descending=True, stable=True).indices
        indices, sizes = order[..., :width].int().contiguous(), (block_q, block_k, n_q, n_k)
        return cls(indices, counts, *sizes, uneven=True)
