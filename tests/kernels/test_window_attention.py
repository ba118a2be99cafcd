"""The full step of Re-ttention: two outputs, two LSEs, and the identity that makes them useful."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dit_accel import ops
from dit_accel.kernels.window_attention import reference
from dit_accel.kernels.window_attention import torch as fast
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import assert_close, references


def inputs(n_q: int, n_k: int, d: int, dtype: torch.dtype = torch.float32, keep: float = 0.4):
    q = torch.randn(2, n_q, 2, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, 2, n_k, d).to(dtype) for _ in range(2))
    mask = torch.rand(2, 2, block_count(n_q, 64), block_count(n_k, 64)) < keep
    return q, k, v, BlockTable.from_mask(mask, 64, 64, n_q, n_k)


@pytest.mark.parametrize("n_q,n_k,d", [(1, 1, 64), (63, 65, 80), (65, 63, 128), (300, 200, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_forward(n_q: int, n_k: int, d: int, dtype: torch.dtype, keep: float):
    args = inputs(n_q, n_k, d, dtype, keep)
    out = fast.window_attention(*args)
    for name, *x in zip(
        ("full", "window", "full lse", "window lse"),
        out,
        *references(reference.window_attention, *args),
        strict=True,
    ):
        assert_close(name, *x)


@pytest.mark.parametrize("kv_len", [1, 100, torch.tensor([300, 37]), torch.tensor([0, 64])])
def test_padding_is_never_read(kv_len: int | torch.Tensor):
    q, k, v, table = inputs(130, 300, 32)
    for b, end in enumerate(torch.as_tensor(kv_len).expand(2).tolist()):
        k[b, :, end:], v[b, :, end:] = torch.nan, torch.nan
    out = fast.window_attention(q, k, v, table, kv_len=kv_len)
    wide, same = references(reference.window_attention, q, k, v, table, kv_len=kv_len)
    for name, *x in zip(("full", "window", "full lse", "window lse"), out, wide, same, strict=True):
        assert_close(name, *x)


def test_the_full_output_is_dense_attention_and_the_window_the_sparse_operator():
    q, k, v, table = inputs(200, 300, 64)
    full, window, _, window_lse = ops.window_attention(q, k, v, table)
    torch.testing.assert_close(full, scaled_dot_product_attention(q, k, v))
    expected = ops.block_sparse_attention(q, k, v, table, return_lse=True)
    torch.testing.assert_close((window, window_lse), expected)


def test_the_residual_is_what_the_other_keys_contribute():
    q, k, v, table = inputs(200, 300, 64, torch.float64)
    full, window, lse, window_lse = reference.window_attention(q, k, v, table, dtype=q.dtype)
    ratio = (window_lse - lse).exp()
    assert (ratio <= 1 + 1e-12).all()
    weights = (q @ k.mT / 8).softmax(-1)
    outside = ~table.to_mask().repeat_interleave(64, 2)[:, :, :200].repeat_interleave(64, 3)
    expected = (weights * outside[..., :300]) @ v
    torch.testing.assert_close(full - ratio[..., None] * window, expected)


def test_torch_library_finds_no_fault():
    q, k, v, table = inputs(65, 70, 16)
    args = (q, k, v, table.indices, table.counts, 64, 64, 0.25, None, 50)
    torch.library.opcheck(torch.ops.dit_accel.window_attention.default, args)
