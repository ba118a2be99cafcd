"""The plain torch attention against the naive one: output, LSE and gradients."""

import pytest
import torch

from dit_accel import ops
from dit_accel.kernels.block_sparse_attention import reference
from dit_accel.kernels.block_sparse_attention import torch as fast
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import assert_close, references

LENGTHS = [(1, 1), (63, 65), (64, 64), (65, 63), (1000, 1000), (130, 1000)]


def inputs(n_q: int, n_k: int, d: int, dtype: torch.dtype, keep: float = 0.4):
    q = torch.randn(2, n_q, 2, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, 2, n_k, d).to(dtype) for _ in range(2))
    mask = torch.rand(2, 2, block_count(n_q, 64), block_count(n_k, 64)) < keep
    return q, k, v, BlockTable.from_mask(mask, 64, 64, n_q, n_k)


def check(q, k, v, table, kv_len=None):
    wide, same = references(
        reference.block_sparse_attention, q, k, v, table, return_lse=True, kv_len=kv_len
    )
    out = fast.block_sparse_attention(q, k, v, table, return_lse=True, kv_len=kv_len)
    for name, *tensors in zip(("out", "lse"), out, wide, same, strict=True):
        assert_close(name, *tensors)
    assert out[0].isfinite().all()


@pytest.mark.parametrize("n_q,n_k", LENGTHS)
@pytest.mark.parametrize("d", [64, 80, 96, 128, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward(n_q: int, n_k: int, d: int, dtype: torch.dtype):
    check(*inputs(n_q, n_k, d, dtype))


@pytest.mark.parametrize(
    "kv_len", [1, 64, 100, 299, torch.tensor([300, 37]), torch.tensor([0, 64])]
)
def test_padding_is_never_read(kv_len: int | torch.Tensor):
    q, k, v, table = inputs(130, 300, 32, torch.float32)
    for b, end in enumerate(torch.as_tensor(kv_len).expand(2).tolist()):
        k[b, :, end:], v[b, :, end:] = torch.nan, torch.nan
    check(q, k, v, table, kv_len)


def test_rows_without_a_block_are_zero():
    q, k, v, table = inputs(130, 300, 32, torch.float32, keep=0.0)
    out, lse = fast.block_sparse_attention(q, k, v, table, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out)) and (lse == -torch.inf).all()


def test_one_block_of_strided_keys():
    q, k, v = (torch.randn(1, 64, 2, 64, requires_grad=True) for _ in range(3))
    heads = [x.transpose(1, 2) for x in (q, k, v)]  # as diffusers hands them over
    table = BlockTable.from_mask(torch.ones(1, 2, 1, 1, dtype=torch.bool), 64, 64, 64, 64)
    check(*(x.detach() for x in heads), table)
    out = ops.block_sparse_attention(*heads, table)
    dense = torch.nn.functional.scaled_dot_product_attention(*heads)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, (q, k, v), grad)
    for a, b in zip(mine, torch.autograd.grad(dense, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b)


def test_permuted_table_is_equal():
    q, k, v, table = inputs(200, 300, 32, torch.float32)
    columns = torch.randperm(5)
    full = BlockTable.from_mask(torch.ones_like(table.to_mask()), 64, 64, 200, 300)
    permuted = BlockTable(full.indices[..., columns], full.counts, 64, 64, 200, 300)
    out = [fast.block_sparse_attention(q, k, v, t) for t in (full, permuted)]
    assert torch.equal(*out)


def test_large_logits_stay_finite():
    q, k, v, table = inputs(130, 300, 32, torch.float32, keep=1.0)
    check(q * 100, k * 100, v, table)
    check(q, torch.ones_like(k), v, table)


@pytest.mark.parametrize("module", [reference, fast], ids=["reference", "torch"])
@pytest.mark.parametrize("kv_len", [None, 100, torch.tensor([150, 37])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward(module, kv_len: int | torch.Tensor | None, dtype: torch.dtype):
    q, k, v, table = inputs(130, 150, 24, dtype)
    for b, end in enumerate(torch.as_tensor(150 if kv_len is None else kv_len).expand(2).tolist()):
        k[b, :, end:], v[b, :, end:] = torch.nan, torch.nan
    grad_out, grad_lse = torch.randn_like(q), torch.randn(2, 2, 130)

    def gradients(q, dtype: torch.dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        out, lse = reference.block_sparse_attention(
            *leaves, table, return_lse=True, kv_len=kv_len, dtype=dtype
        )
        lse = lse.masked_fill(lse == -torch.inf, 0)
        return torch.autograd.grad((out, lse), leaves, (grad_out.to(dtype), grad_lse.to(dtype)))

    wide, same = references(gradients, q)
    out, lse = module.block_sparse_attention(q, k, v, table, return_lse=True, kv_len=kv_len)
    found = module.backward(grad_out, grad_lse, q, k, v, out, lse, table, kv_len=kv_len)
    for name, *tensors in zip(("dq", "dk", "dv"), found, wide, same, strict=True):
        assert_close(name, *tensors)
