"""The Triton attention and its gradients against the naive ones."""

from dataclasses import replace

import pytest
import torch

from dit_accel.kernels.block_sparse_attention import reference
from dit_accel.kernels.block_sparse_attention import triton as kernel
from dit_accel.kernels.launch import LAUNCHES
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import WIDER, assert_close, references

HALF = torch.float16
CASES = [
    (1, 1, 64, 64, 64, torch.float32),
    (63, 65, 80, 64, 64, HALF),
    (64, 64, 96, 64, 64, torch.float32),
    (65, 63, 128, 64, 64, HALF),
    (65, 300, 96, 64, 128, HALF),
    (130, 300, 128, 128, 128, torch.float32),
    (130, 200, 80, 128, 64, torch.float32),
    (70, 200, 64, 32, 16, HALF),
    (1000, 1000, 64, 128, 128, HALF),
]


def inputs(n_q, n_k, d, block_q, block_k, dtype, device="cpu", batch=1, keep=0.5):
    q, k, v = (
        torch.randn(batch, n, 2, d).to(device, dtype).transpose(1, 2) for n in (n_q, n_k, n_k)
    )
    mask = torch.rand(batch, 2, block_count(n_q, block_q), block_count(n_k, block_k)) < keep
    return q, k, v, BlockTable.from_mask(mask.to(device), block_q, block_k, n_q, n_k)


def check(q, k, v, table, kv_len=None, scale=None):
    wide, same = references(reference.block_sparse_attention, q, k, v, table, scale, True, kv_len)
    out = kernel.block_sparse_attention(q, k, v, table, scale, True, kv_len)
    assert_close("out", out[0], wide[0], same[0])
    assert_close("lse", out[1], wide[1], same[1].float())
    return out[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, device):
    q, k, v, table = inputs(*case, device)
    assert check(q, k, v, table).stride() == q.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("n_q,n_k", [(1, 1), (63, 65), (1000, 1000), (4096, 4100)])
@pytest.mark.parametrize("d", [64, 80, 96, 128])
@pytest.mark.parametrize("block_q", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
def test_forward_bfloat16(n_q, n_k, d, block_q, block_k):
    check(*inputs(n_q, n_k, d, block_q, block_k, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("kv_len", [1, 64, 130, torch.tensor([200, 37]), torch.tensor([0, 64])])
def test_padding_is_never_read(kv_len, device):
    q, k, v, table = inputs(70, 200, 64, 64, 64, HALF, device, batch=2, keep=0.8)
    for b, end in enumerate(torch.as_tensor(kv_len).expand(2).tolist()):
        k[b, :, end:], v[b, :, end:] = torch.nan, torch.nan
    check(q, k, v, table, kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len)


def test_any_strides(device):
    q, k, v, table = inputs(70, 200, 64, 64, 64, HALF, device)
    wide = torch.randn(1, 2, 200, 128, device=device).to(HALF)
    check(q, wide[..., ::2], wide.mT.contiguous().mT[..., :64], table, scale=0.3)


@pytest.mark.parametrize("d", [64, 128])
def test_descriptors_and_pointers_agree(d, device):
    q, k, v, table = inputs(70, 200, d, 64, 64, HALF, device)
    row = kernel.find("forward", kernel.capability_of(q), d, 64)
    outs = []
    for descriptors in (False, True):
        out = torch.empty_like(q)
        launch = replace(row, descriptors=descriptors)
        call = kernel.forward(q, k, v, out, None, table, launch)
        assert (call[1]["desc_k"] is not None) == descriptors
        kernel.run(kernel._block_sparse_attention_fwd_kernel, *call)
        outs.append(out)
    assert torch.equal(*outs)


def test_all_blocks_kept_is_dense_attention(device):
    q, k, v, table = inputs(65, 130, 64, 64, 64, torch.float32, device, keep=2)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(kernel.block_sparse_attention(q, k, v, table), dense)


def test_rows_without_a_block_are_zero(device):
    q, k, v, table = inputs(65, 130, 64, 64, 64, HALF, device, keep=0)
    out, lse = kernel.block_sparse_attention(q, k, v, table, return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()


def test_entries_beyond_the_count_are_ignored(device):
    q, k, v, table = inputs(65, 300, 64, 64, 64, HALF, device)
    noise = torch.randint_like(table.indices, table.key_blocks)
    other = replace(table, indices=torch.where(table.valid(), table.indices, noise))
    assert torch.equal(*(kernel.block_sparse_attention(q, k, v, t) for t in (table, other)))


# sums of 128 squares are exact in float32 in any order: equal keys have equal logits on any CPU
@pytest.mark.parametrize("size", [1.0, 300.0, 61440.0])
def test_large_logits_stay_finite(size, device):
    q, k, v, table = inputs(65, 130, 128, 64, 64, HALF, device, keep=2)
    q, k = q.sign() * size, k.sign() * size
    assert kernel.block_sparse_attention(q, k, v, table).isfinite().all()
    k = torch.full_like(k, size)
    out = kernel.block_sparse_attention(torch.full_like(q, size), k, v, table)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "case,kv_len",
    [
        ((65, 130, 64, 64, 64, torch.float32), None),
        ((65, 200, 80, 64, 64, HALF), None),
        ((63, 200, 96, 64, 128, torch.float32), 150),
        ((130, 150, 128, 128, 64, HALF), torch.tensor([100])),
        ((70, 64, 64, 32, 16, torch.float32), torch.tensor([0])),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_lse", [False, True])
def test_backward(case, kv_len, with_lse, device):
    q, k, v, table = inputs(*case, device)
    if kv_len is not None:
        k[:, :, int(kv_len) :], v[:, :, int(kv_len) :] = torch.nan, torch.nan
    out, lse = kernel.block_sparse_attention(q, k, v, table, None, True, kv_len)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse) if with_lse else None
    grads = kernel.backward(grad_out, grad_lse, q, k, v, out, lse, table, None, kv_len)
    expected = []
    for dtype in (WIDER[q.dtype], q.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        outs = reference.block_sparse_attention(*leaves, table, None, True, kv_len, dtype=dtype)
        loss = (outs[0] * grad_out.to(dtype)).sum()
        if with_lse:
            loss = loss + (outs[1] * grad_lse.to(dtype)).where(outs[1].isfinite(), 0).sum()
        expected.append(torch.autograd.grad(loss, leaves))
    for name, *tensors in zip(("dq", "dk", "dv"), grads, *expected, strict=True):
        assert_close(name, *tensors)


def lazily(q, k, v, table, lazy, kv_len=None):
    """Output and log-sum-exp by the launch in use, rescaled where a maximum grew by `lazy`."""
    row = kernel.find("forward", kernel.capability_of(q), q.shape[-1], table.block_q, False)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    launch = replace(row, lazy=lazy)
    kernel.attend(q, k, v, out, lse, table, launch, None, kv_len)
    return out, lse


LAZY = [(64, HALF, growth, None) for growth in (-1, 0, 1)]
LAZY += [(64, HALF, 1, torch.tensor([70, 0])), (80, torch.float32, 1, 70)]


@pytest.mark.parametrize("d, dtype, growth, kv_len", LAZY)
def test_lazy_rescaling_stays_within_rounding(d, dtype, growth, kv_len, device):
    """Logits that fall, stay and grow from block to block by far more than the threshold."""
    q, k, v, table = inputs(33, 96, d, 32, 32, dtype, device, batch=2, keep=0.8)
    k = (
        4 * k
        + growth
        * 0.5
        * torch.arange(k.shape[2], device=device)[:, None].to(k)
        * q.mean(2)[:, :, None]
    )
    kv_len = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    wide, same = references(reference.block_sparse_attention, q, k, v, table, None, True, kv_len)
    usual, lazy = (lazily(q, k, v, table, x, kv_len) for x in (0.0, 8.0))
    for name, always, rare, *known in zip(("out", "lse"), usual, lazy, wide, same, strict=True):
        assert_close(name, rare, known[0], known[1].to(rare.dtype))
        assert_close(name, always, known[0], known[1].to(rare.dtype))


def test_lazy_rescaling_is_off_and_keeps_an_earlier_maximum(device):
    q, k, v, table = inputs(64, 256, 64, 64, 64, torch.float32, device, keep=2)
    usual = kernel.block_sparse_attention(q, k, v, table, None, True)
    for one, other in zip(usual, lazily(q, k, v, table, 0.0), strict=True):
        assert torch.equal(one, other)
    small, large = (lazily(q, k, v, table, lazy)[0] for lazy in (8.0, 1000.0))
    assert torch.equal(small, large)  # these logits never grow by 8: the first maximum serves all
    assert not torch.equal(small, usual[0]) and (small - usual[0]).abs().max() < 1e-6


def test_who_can_rescale_lazily():
    rows = [kernel.find("forward", 90, 128, 128), kernel.find("forward", 90, 64, 64)]
    assert [row.specialized for row in rows] == [True, False]
    assert not any(row.lazy for row in LAUNCHES)  # slower, by 17 to 26 % on an H200
    for row, lazy in ((rows[0], 8.0), (rows[1], -1.0)):
        with pytest.raises(ValueError, match="only the plain forward kernel rescales lazily"):
            replace(row, lazy=lazy)
