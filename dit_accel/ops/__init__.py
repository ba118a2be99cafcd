"""The operators: q, k, v and a block table → O."""

from dit_accel.kernels.block_table.torch import block_means, part_scores
from dit_accel.kernels.sparse_linear_attention.features import EPS, features, key_mask
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
from dit_accel.ops.rope import norm_rope
from dit_accel.ops.weighted import linear_attention, over_rms, weighted_linear_attention

__all__ = [
    "EPS",
    "block_means",
    "block_sparse_attention",
    "block_table",
    "choose_blocks",
    "features",
    "key_mask",
    "linear_attention",
    "norm_rope",
    "of_tiles",
    "over_rms",
    "part_scores",
    "pooled_attention",
    "ragged_attention",
    "rectified_attention",
    "sparse_linear_attention",
    "tile_means",
    "weighted_linear_attention",
    "window_attention",
]
