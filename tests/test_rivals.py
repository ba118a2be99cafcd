"""Rivals in the benchmark: given our table as their packages want it, absent with a reason.

Their kernels need a GPU, so their entry points are stood in for, with the signatures of
flash-attn-4 4.0.0b36 and nvidia-cudnn-frontend 1.32.0, by PyTorch's attention under their masks.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from dit_accel import bench, ops
from dit_accel.bench import baselines, rivals
from dit_accel.bench.results import line
from dit_accel.ops import backends
from dit_accel.table import block_count


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor | None = None
    full_block_idx: torch.Tensor | None = None
    cu_total_m_blocks: torch.Tensor | None = None
    cu_block_idx_offsets: torch.Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: torch.Tensor | None = None
    dq_write_order_full: torch.Tensor | None = None
    spt: bool | None = None


def pairs(indices, counts, block, n_q, n_k):
    """[B, H, n_q, n_k] bool of block indices."""
    blocks = block_count(n_k, block[1])
    valid = torch.arange(indices.shape[-1]) < counts[..., None]
    kept = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool)
    kept.scatter_(-1, torch.where(valid, indices, blocks).long(), True)
    wide = kept[..., :-1].repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)
    return wide[:, :, :n_q, :n_k]


def masked(q, k, v, mask, scale=None):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False,
    gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
):  # fmt: skip
    mask, sizes = None, (q.shape[1], k.shape[1])
    if block_sparse_tensors is not None:
        s = block_sparse_tensors
        assert not s.mask_block_cnt.any()
        mask = pairs(s.full_block_idx, s.full_block_cnt, s.block_size, *sizes)
    if block_sparse_tensors_bwd is not None:
        s = block_sparse_tensors_bwd
        turned = pairs(s.full_block_idx, s.full_block_cnt, s.block_size[::-1], *sizes[::-1])
        assert torch.equal(turned.transpose(2, 3), mask)
    return masked(q, k, v, mask, softmax_scale), None


def block_sparse_attention_forward(
    q_tensor, k_tensor, v_tensor, q2k_block_index, block_sparse_num=None, block_sizes=None,
    q2k_block_nums=None, *, sparse_block_size=None, allow_empty_block_nums=False,
    softmax_scale=None, pack_gqa=None, layout="bhsd", kv_splits=1, use_clc=None,
):  # fmt: skip
    assert layout == "bshd" and q_tensor.is_contiguous() and k_tensor.is_contiguous()
    block, n_q, n_k = sparse_block_size, q_tensor.shape[1], k_tensor.shape[1]
    assert n_q % 64 == 0 and q2k_block_index.shape[2] == block_count(n_q, block)
    tail = n_k % block
    assert (block_sizes is None) == (tail == 0)
    assert block_sizes is None or (
        block_sizes[-1] == tail and set(block_sizes[:-1].tolist()) <= {block}
    )
    mask = pairs(q2k_block_index, q2k_block_nums, (block, block), n_q, n_k)
    return {"o_tensor": masked(q_tensor, k_tensor, v_tensor, mask), "lse_tensor": None}


def block_sparse_attention_fp8_forward(
    q_tensor, k_tensor, v_tensor, q2k_block_index, block_sparse_num=None, block_sizes=None,
    q2k_block_nums=None, *, softmax_scale=None, sparse_block_size=64, kv_splits=1,
):  # fmt: skip
    q, k, v = (x.transpose(1, 2) for x in (q_tensor, k_tensor, v_tensor))
    counts = torch.full(q2k_block_index.shape[:3], q2k_block_index.shape[3])
    block = (sparse_block_size, sparse_block_size)
    mask = pairs(q2k_block_index, counts, block, q.shape[1], k.shape[1])
    return {"o_tensor": masked(q, k, v, mask).transpose(1, 2)}


@pytest.fixture
def installed(monkeypatch):
    def module(name: str, **holds: Any) -> None:
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        vars(made).update(holds)
        monkeypatch.setitem(sys.modules, name, made)

    module("flash_attn")
    module("flash_attn.cute", flash_attn_func=flash_attn_func)
    module("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch)
    module("cudnn")
    module(
        "cudnn.block_sparse_attention",
        block_sparse_attention_forward=block_sparse_attention_forward,
        block_sparse_attention_fp8_forward=block_sparse_attention_fp8_forward,
    )
    backends.run.cache_clear()
    yield
    backends.run.cache_clear()


def case(n=300, block=(64, 64), keep=0.4):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 16, generator=generator) for _ in range(3))
    return q, k, v, ops.block_table(q, k, keep, *block)


@pytest.mark.parametrize(("n", "block"), [(300, (64, 64)), (384, (64, 64)), (300, (128, 64))])
def test_each_is_given_our_table(installed, n, block):
    q, k, v, table = case(n, block)
    found, reasons = rivals.runs(q, k, v, table)
    wanted = ops.block_sparse_attention(q, k, v, table)
    for name in found:
        right = F.scaled_dot_product_attention(q, k, v) if name == "flash4" else wanted
        torch.testing.assert_close(found[name](), right)
    if block == (128, 64):
        assert reasons["bsa"] == "its blocks are square, not 128 × 64"
    assert ("bsa" in found) == (block == (64, 64)) and ("bsa_fp8" in found) == (n == 384)


def test_a_backward_gets_the_table_turned(installed):
    rivals.flash4_backward(*case(300, (128, 64)))()


def test_without_the_packages_the_reason_is_said():
    found, reasons = rivals.runs(*case())
    assert found == {} and set(reasons) == {"flash4", "flash4_sparse", "bsa", "bsa_fp8"}
    assert set(reasons.values()) == {'it is not installed: pip install "dit-accel[rivals]"'}
    with pytest.raises(ValueError, match="pip install"):
        rivals.flash4_backward(*case())


def test_ratios_refer_to_the_fastest_dense(installed, monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", bench.Shape("small", 1, 2, 300, 16))
    times = {"dense": 9.0, "cudnn": 8.0, "flash4": 6.0, "ours": 2.0, "attention": 1.0, "map": 1.0}

    def fixed(runs, *how):
        return {name: times.get(name, 3.0) for name in runs}

    monkeypatch.setattr("dit_accel.bench.operators.times", fixed)
    monkeypatch.setattr(baselines, "_BACKENDS", {})
    monkeypatch.setattr(
        "dit_accel.bench.baselines.torch.compile", lambda flex: lambda q, k, v, block_mask: q
    )
    monkeypatch.setattr("dit_accel.bench.operators.extras", lambda device: True)
    (row,) = bench.run_bench(
        ["block_sparse_attention"], ["small"], [0.4], "cpu", rounds=1, backward=True
    )
    assert (row["dense_best"], row["ratio"]) == ("flash4", 3.0)
    assert row["flash4_both_ms"] == row["ours_both_ms"] == 3.0
    assert row["bsa_error"] < 1e-5 < row["flex_error"]  # flex was made to be wrong
    assert "whole blocks" in row["bsa_fp8_absent"] and "dense (flash4) 6.00 ms" in line(row)
