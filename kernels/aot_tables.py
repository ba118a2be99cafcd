"""The kernels of block tables (means, pooled keys, scores, levels, the choice) for a 480p video."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from dit_accel.kernels.aot_inputs import SHAPE, Case, empty, table, tokens
from dit_accel.kernels.block_table import means as means_kernels
from dit_accel.kernels.block_table import pool as pool_kernels
from dit_accel.kernels.block_table import select as select_kernels
from dit_accel.kernels.block_table import sub as sub_kernels
from dit_accel.kernels.block_table import triton as table_kernels
from dit_accel.kernels.launch import Launch
from dit_accel.table import block_count


def means_case(launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = "") -> Case:
    """The kernel of the block means of q and k, with deviations if the row is of these; extra
    "parts": with the means of four parts, "pool": that of keys and values."""
    if extra == "pool":
        return pooled_case(launch, head_dim, dtype)
    x = tokens(head_dim, dtype)
    blocks = (*SHAPE[:2], block_count(SHAPE[2], launch.block), head_dim)
    mean, far = empty(*blocks), empty(*blocks, dtype=dtype) if launch.op == "spreads" else None
    sub = empty(*blocks[:2], 4 * blocks[2], head_dim, dtype=dtype) if extra == "parts" else None
    return means_kernels._block_means_fwd_kernel, {
        "q": x, "k": x, "q_mean": mean, "k_mean": mean, "q_far": far, "k_far": far,
        "q_sub": sub, "k_sub": sub, "PARTS": 4 if extra else 1,
        "kv_len": None, "s_q": x.stride(), "s_k": x.stride(), "n_q": SHAPE[2], "n": SHAPE[2],
        "m_q": blocks[2], "m_k": blocks[2], "d": head_dim, "BLOCK_Q": launch.block, "BLOCK_K": 64,
        **means_kernels.column_tiles(head_dim, launch),
    }  # fmt: skip


def pooled_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel of pooled keys and values; of a row of deviations, with those of the keys."""
    x, half = tokens(head_dim, dtype), empty(*SHAPE[:2], 512, head_dim, dtype=dtype)
    known = empty(*half.shape) if launch.op == "means" else None
    return pool_kernels._block_pool_fwd_kernel, {
        "k": x, "v": x, "known": known, "k_mean": half, "k_rest": half,
        "k_far": half if known is None else None, "v_mean": half, "kv_len": None,
        "s_k": x.stride(), "s_v": x.stride(), "n": SHAPE[2], "m_known": 512, "d": head_dim,
        "BLOCK": launch.block, **means_kernels.column_tiles(head_dim, launch),
    }  # fmt: skip


def scores_case(launch: Launch, head_dim: int, dtype: torch.dtype) -> Case:
    """The kernel of the scores of block means."""
    mean = empty(*SHAPE[:2], 512, head_dim)
    return table_kernels._block_scores_fwd_kernel, {
        "q": mean, "k": mean, "score": mean, "m_q": 512, "m_k": 512, "m_pad": 512, "d": head_dim,
        "TILE_Q": launch.tile, "TILE_K": launch.tile, "TILE_D": table_kernels.MEAN_TILE,
        "PRECISION": launch.precision,
    }  # fmt: skip


def levels_case(launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = "4") -> Case:
    """The kernel of the levels of blocks in parts, `extra` of them."""
    rows, parts = 512 * int(extra), int(extra)
    mean = empty(*SHAPE[:2], rows, head_dim, dtype=dtype)
    return sub_kernels._block_levels_fwd_kernel, {
        "q": mean, "k": mean, "level": empty(*SHAPE[:2], rows, 512), "kv_len": None,
        "n_k": SHAPE[2], "i_first": 0, "n_heads": 12, "m_q": rows, "m_k": rows, "m_pad": 512,
        "d": head_dim, "scale": 0.1, "SIZE": 64 // parts, "PARTS": parts,
        "TILE_Q": launch.block, "TILE_K": launch.tile, "D": 1 << (head_dim - 1).bit_length(),
        "STAGES": launch.stages, "PRECISION": launch.precision,
    }  # fmt: skip


def select_case(launch: Launch, head_dim: int, dtype: torch.dtype, extra: str = "") -> Case:
    """The kernel that chooses the blocks of a row, for as many as it serves; extra: "mass", or
    "parts" for four of a block."""
    width = 1024 * launch.warps
    top_p = {"mass": 0.3 if extra == "mass" else None, "scale": 0.1 if extra == "mass" else None}
    kept, flags = table(64, 64), empty(1, 1, 1, 2048, dtype=torch.uint8)
    return select_kernels._block_select_fwd_kernel, {
        "score": empty(1, 1), "forced": flags, "near": flags, "indices": kept.indices,
        "counts": kept.counts, "bits": kept.counts, "kv_len": None, "wants": None,
        "s_f": (0, 0, 0, 1), "s_n": (2048, 1), "s_w": (0, 0),
        "i_first": 0, "n_heads": 12, **top_p, "n_q": 75600, "n_k": 75600,
        "m_k": 1182, "m_pad": 1184, "n_want": 60, "width": 80, "n_words": 40,
        "BLOCK_Q": 64, "BLOCK_K": 64, "PARTS": 4 if extra == "parts" else 1, "M": width,
    }  # fmt: skip


CASES: dict[str, Callable[..., Case]] = {
    "means": means_case,
    "spreads": means_case,
    "parts": partial(means_case, extra="parts"),
    "scores": scores_case,
    "levels": levels_case,
    "select": select_case,
}
