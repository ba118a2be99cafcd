"""The operators: q, k, v and a block table → O."""

from dit_accel.kernels.block_table.torch import block_means, part_scores
from dit_accel.kernels.sparse_linear_attention.features import EPS, features
from dit_accel.ops.operators import (
    block_sparse_attention,
    block_table,
    choose_blocks,
    pooled_attention,
    rectified_attention,
    sparse_linear_attention,
    window_attention,
)
from dit_accel.ops.ragged import of_tiles, ragged_attention, tile_means

__all__ = [
    "EPS",
    "block_means",
    "block_sparse_attention",
    "block_table",
    "choose_blocks",
    "features",
    "of_tiles",
    "part_scores",
    "pooled_attention",
    "ragged_attention",
    "rectified_attention",
    "sparse_linear_attention",
    "tile_means",
    "window_attention",
]
