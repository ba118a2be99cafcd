"""The Triton window attention against the naive one."""

import pytest
import torch

from dit_accel.kernels.window_attention import reference, triton
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import assert_close, references

HALF = torch.float16
CASES = [
    ((1, 1, 64, 64, 64, torch.float32), None),
    ((65, 200, 64, 64, 64, torch.float32), None),
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


@pytest.mark.parametrize("keep", [0.0, 0.4, 2.0])
@pytest.mark.parametrize("case,kv_len", CASES, ids=str)
def test_forward(case, kv_len, keep: float, device: str):
    q, k, v, table = inputs(*case, device, keep)
    kv_len = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    args = (q, k, v, table, None, kv_len)
    out = triton.window_attention(*args)
    wide, same = references(reference.window_attention, *args)
    for name, *x in zip(("full", "window", "full lse", "window lse"), out, wide, same, strict=True):
        assert_close(name, *(y.float() if "lse" in name else y for y in x))


def test_padding_is_never_read(device: str):
    q, k, v, table = inputs(65, 100, 64, 64, 32, torch.float32, device)
    expected = reference.window_attention(q, k, v, table, kv_len=70)
    k[:, :, 70:], v[:, :, 70:] = torch.nan, torch.nan
    torch.testing.assert_close(triton.window_attention(q, k, v, table, kv_len=70), expected)
