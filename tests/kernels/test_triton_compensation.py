"""The Triton pooled and rectified attention against the naive ones."""

import pytest
import torch

from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.block_table import triton as tables
from dit_accel.kernels.pooled_attention import reference as pooled_reference
from dit_accel.kernels.pooled_attention import triton as pooled
from dit_accel.kernels.rectified_attention import reference as rectified_reference
from dit_accel.kernels.rectified_attention import torch as rectified_torch
from dit_accel.kernels.rectified_attention import triton as rectified
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import WIDER, assert_close, references

HALF = torch.float16
CASES = [
    ((1, 1, 64, 64, 64, torch.float32), None),
    ((65, 200, 64, 64, 16, torch.float32), None),
    ((65, 100, 80, 64, 32, HALF), None),
    ((65, 150, 96, 64, 32, torch.float32), 100),
    ((65, 300, 128, 128, 128, HALF), torch.tensor([200])),
    ((40, 100, 64, 32, 32, torch.float32), torch.tensor([0])),
]


def inputs(n_q, n_k, d, block_q, block_k, dtype, device="cpu", keep=0.4):
    q, k, v = (
        (torch.randn(1, n, 2, d) + 0.3).to(device, dtype).transpose(1, 2) for n in (n_q, n_k, n_k)
    )
    mask = torch.rand(1, 2, block_count(n_q, block_q), block_count(n_k, block_k)) < keep
    return q, k, v, BlockTable.from_mask(mask.to(device), block_q, block_k, n_q, n_k)


@pytest.mark.parametrize("case,kv_len", CASES, ids=str)
def test_pooled(case, kv_len, device):
    q, k, v, table = inputs(*case, device)
    kv_len = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    out = pooled.pooled_attention(q, k, v, table, None, kv_len, True)
    wide, same = references(pooled_reference.pooled_attention, q, k, v, table, None, kv_len, True)
    assert_close("out", out[0], wide[0], same[0])
    assert_close("lse", out[1], wide[1], same[1].float())


@pytest.mark.parametrize("case,kv_len", CASES[2:4], ids=str)
def test_pooled_backward(case, kv_len, device):
    q, k, v, table = inputs(*case, device)
    out, lse = pooled.pooled_attention(q, k, v, table, None, kv_len, True)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    grads = pooled.backward(grad_out, grad_lse, q, k, v, out, lse, table, None, kv_len)
    expected = []
    for dtype in (WIDER[q.dtype], q.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        arguments = (*leaves, table, None, kv_len, True)
        outs = pooled_reference.pooled_attention(*arguments, dtype=dtype)
        loss = (outs[0] * grad_out.to(dtype)).sum()
        loss = loss + (outs[1] * grad_lse.to(dtype)).where(outs[1].isfinite(), 0).sum()
        expected.append(torch.autograd.grad(loss, leaves))
    for name, *tensors in zip(("dq", "dk", "dv"), grads, *expected, strict=True):
        assert_close(name, *tensors)


@pytest.mark.parametrize("case,kv_len", CASES, ids=str)
def test_means_of_the_table_give_the_same_bits(case, kv_len, device):
    q, k, v, table = inputs(*case, device)
    kv_len = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    options = {"kv_len": kv_len, "return_means": True, "spreads": True}
    means = tables.block_table(q, k, 0.4, table.block_q, table.block_k, **options)[1]
    plain = pooled.pooled_attention(q, k, v, table, None, kv_len)
    assert torch.equal(pooled.pooled_attention(q, k, v, table, None, kv_len, k_mean=means.k), plain)
    for gapr in (True, False):
        arguments = (q, k, v, table, None, gapr, kv_len)
        plain = rectified.rectified_attention(*arguments)
        assert torch.equal(rectified.rectified_attention(*arguments, means=means), plain)


def test_pooled_with_every_block_kept_is_exact(device):
    q, k, v, table = inputs(65, 100, 64, 64, 32, HALF, device, keep=2)
    exact = sparse.block_sparse_attention(q, k, v, table)
    assert torch.equal(pooled.pooled_attention(q, k, v, table), exact)


@pytest.mark.parametrize("gapr", [True, False])
@pytest.mark.parametrize("case,kv_len", CASES, ids=str)
def test_rectified(case, kv_len, gapr, device):
    q, k, v, table = inputs(*case, device)
    kv_len = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    out = rectified.rectified_attention(q, k, v, table, None, gapr, kv_len)
    arguments = (q, k, v, table, None, gapr, kv_len)
    assert_close("out", out, *references(rectified_reference.rectified_attention, *arguments))


def test_a_small_r_is_as_exact_as_a_large_one(device):
    q, k, v, table = inputs(65, 300, 64, 64, 32, HALF, device)
    q, k, scale = 2 * q + 1, 2 * k + 1, 1.0  # of the logits of means 16 bits keep one decimal
    least = tables.block_table(-q, k, 0.2, 64, 32)
    for kept in (table, least):
        found = rectified.coefficients(q, k, v, kept, scale, gapr=False)
        exact = rectified_torch.coefficients(q, k, v, kept, scale, gapr=False)
        torch.testing.assert_close(found[0], exact[0], rtol=1e-3, atol=0)
        torch.testing.assert_close(found[1], exact[1], rtol=1e-3, atol=2e-3)
    assert 0 < exact[0].max() < 1e-4


@pytest.mark.parametrize("gapr", [True, False])
def test_rectified_rows_sum_to_one(gapr, device):
    q, k, v, table = inputs(65, 300, 64, 64, 32, torch.float32, device)
    mask = table.to_mask()
    mask[..., 0] = True
    table = BlockTable.from_mask(mask, 64, 32, 65, 300)
    out = rectified.rectified_attention(q, k, torch.ones_like(v), table, gapr=gapr)
    torch.testing.assert_close(out, torch.ones_like(out))
