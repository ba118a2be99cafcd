"""Attention in eight bits: the kernel against its naive emulation and exact attention."""

from dataclasses import replace

import pytest
import torch

from dit_accel.kernels.block_sparse_attention import reference as exact
from dit_accel.kernels.int8_attention import quantize, reference
from dit_accel.kernels.int8_attention import torch as plain
from dit_accel.kernels.int8_attention import triton as kernel
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import WIDER, assert_close

HALF = torch.float16
CASES = [
    (1, 1, 64, 64, 64, torch.float32),
    (63, 65, 80, 64, 64, HALF),
    (64, 64, 96, 64, 64, torch.float32),
    (65, 63, 128, 64, 64, HALF),
    (65, 300, 64, 64, 128, HALF),
    (130, 300, 128, 128, 64, torch.float32),
    (1100, 1100, 64, 128, 128, HALF),
]


pytestmark = pytest.mark.usefixtures("right_e4m3")


def inputs(n_q, n_k, d, block_q, block_k, dtype, device="cpu", batch=1, keep=0.5):
    q, k, v = (
        torch.randn(batch, n, 2, d).to(device, dtype).transpose(1, 2) for n in (n_q, n_k, n_k)
    )
    k = k + 3 * torch.randn(1, 2, 1, d, device=device).to(dtype)
    mask = torch.rand(batch, 2, block_count(n_q, block_q), block_count(n_k, block_k)) < keep
    return q, k, v, BlockTable.from_mask(mask.to(device), block_q, block_k, n_q, n_k)


def check(q, k, v, table, kv_len=None, scale=None, fn=kernel.int8_attention):
    """Error against exact attention ≤ 2 × that of the emulation; LSE is the emulation's."""
    options = {"scale": scale, "return_lse": True, "kv_len": kv_len}
    wide = exact.block_sparse_attention(q, k, v, table, dtype=WIDER[q.dtype], **options)
    same = reference.int8_attention(q, k, v, table, **options)
    out = fn(q, k, v, table, **options)
    assert_close("out", out[0], wide[0], same[0])
    assert_close("lse", out[1], wide[1], same[1])
    torch.testing.assert_close(out[1], same[1], atol=2e-2, rtol=1e-4)
    return out[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, device):
    q, k, v, table = inputs(*case, device)
    assert check(q, k, v, table).stride() == q.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("n_q,n_k", [(1, 1), (63, 65), (1000, 1000), (4096, 4100)])
@pytest.mark.parametrize("d", [64, 80, 96, 128])
@pytest.mark.parametrize("block_q,block_k", [(64, 64), (128, 64), (128, 128)])
def test_forward_bfloat16(n_q, n_k, d, block_q, block_k):
    check(*inputs(n_q, n_k, d, block_q, block_k, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("kv_len", [1, 64, 130, torch.tensor([200, 37]), torch.tensor([0, 64])])
@pytest.mark.parametrize("fn", [kernel.int8_attention, plain.int8_attention])
def test_padding_is_never_read(kv_len, fn, device):
    q, k, v, table = inputs(70, 200, 64, 64, 64, HALF, device, batch=2, keep=0.8)
    for b, end in enumerate(torch.as_tensor(kv_len).expand(2).tolist()):
        k[b, :, end:], v[b, :, end:] = torch.nan, torch.nan
    kv_len = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    check(q, k, v, table, kv_len, fn=fn)


@pytest.mark.parametrize("fn", [kernel.int8_attention, plain.int8_attention])
@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0])
def test_any_strides_and_scales(scale, fn, device):
    q, k, v, table = inputs(70, 200, 64, 64, 64, HALF, device)
    wide = torch.randn(1, 2, 200, 128, device=device).to(HALF)
    check(q, wide[..., ::2], wide.mT.contiguous().mT[..., :64], table, scale=scale, fn=fn)


def test_descriptors_and_pointers_agree(device):
    q, k, v, table = inputs(70, 200, 64, 64, 64, HALF, device)
    row = kernel.find("int8", kernel.capability_of(q), 64, 64)
    keys, outs = quantize.quantize(k, v, 64, 64), []
    for descriptors in (False, True):
        out = torch.empty_like(q)
        call = kernel.forward(q, keys, out, None, table, replace(row, descriptors=descriptors))
        kernel.run(kernel._int8_attention_fwd_kernel, *call)
        outs.append(out)
    assert torch.equal(*outs)


def test_values_in_their_own_dtype(device):
    """What a GPU without e4m3 does: only q and k are rounded, and the error is a tenth."""
    q, k, v, table = inputs(70, 200, 64, 64, 64, HALF, device)
    row = kernel.find("int8", 80, 64, 64)
    keys, out = quantize.quantize(k, v, 64, row.tile, dtype=HALF), torch.empty_like(q)
    call = kernel.forward(q, keys, out, None, table, replace(row, descriptors=False))
    kernel.run(kernel._int8_attention_fwd_kernel, *call)
    expected = reference.int8_attention(q, k, v, table, group=row.tile, values=HALF)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)


def test_keys_and_values_as_quantised(device):
    """What is stored is the emulation's but for ties, the values in the order of `shuffled`."""
    _, k, v, _ = inputs(1, 1100, 80, 64, 64, HALF, device)
    keys = quantize.quantize(k, v, 128, 64, kv_len=1050)
    _, k8, v8, mean = reference.rounded(k.float(), k, v, 1050, 64, torch.float8_e4m3fn)
    torch.testing.assert_close(keys.mean, mean[:, :, 0], atol=1e-5, rtol=1e-5)
    step = keys.k_scale.repeat_interleave(64, 2)[..., None]
    found = (keys.k.float() * step)[:, :, :1100, :80]
    assert ((found - k8).abs() > 1e-4).float().mean() < 1e-3
    order = torch.tensor([0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15], device=device)
    place = (torch.arange(0, 1152, 16, device=device)[:, None] + order).flatten()
    found = torch.empty(1, 2, 1152, 128, device=device)
    found[:, :, place] = (
        keys.v.float().mT * keys.v_exponent.exp2().repeat_interleave(64, 2)[..., None]
    )
    assert ((found[:, :, :1100, :80] - v8).abs() > 1e-4).float().mean() < 1e-3
    assert not keys.k[:, :, 1050:].any() and not keys.v.float()[..., 1056:].any()


@pytest.mark.parametrize("fn", [kernel.int8_attention, plain.int8_attention])
def test_extremes_stay_finite(fn, device):
    q, k, v, table = inputs(65, 130, 64, 64, 64, HALF, device, keep=2)
    for x, y, z in ((q * 1e4, k * 1e4, v), (0 * q, k, v), (q, k, 0 * v), (q, 0 * k + 5, v * 6e3)):
        x, y, z = (t.clamp(-65504, 65504) for t in (x, y, z))
        out, lse = fn(x, y, z, table, return_lse=True)
        assert out.isfinite().all() and lse.isfinite().all()
        assert (out.abs() <= 1.1 * z.abs().amax(2, keepdim=True)).all()


def test_a_mean_of_all_keys_changes_nothing(device):
    """Keys moved by a constant: the same weights, LSE moved by scale · q · constant."""
    q, k, v, table = inputs(70, 200, 64, 64, 64, torch.float32, device)
    shift = torch.randn(1, 2, 1, 64, device=device)
    out, lse = kernel.int8_attention(q, k, v, table, return_lse=True)
    moved = kernel.int8_attention(q, k + shift, v, table, return_lse=True)
    torch.testing.assert_close(moved[1], lse + (q * shift).sum(-1) / 8, atol=3e-3, rtol=1e-4)
    assert (moved[0] - out).norm() < 0.01 * out.norm()
