"""The Triton linear branch against the naive one."""

import pytest
import torch

from dit_accel.kernels.sparse_linear_attention import reference, states, triton
from dit_accel.kernels.sparse_linear_attention.features import FEATURE_MAPS, key_share
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import WIDER, assert_close, references

HALF = torch.float16
FULL = torch.float32
CASES = [
    ((1, 1, 64, 64, 64, FULL), None),
    ((65, 200, 64, 64, 64, FULL), None),
    ((65, 100, 80, 64, 32, HALF), None),
    ((65, 150, 96, 64, 32, FULL), 100),
    ((65, 300, 128, 128, 128, HALF), torch.tensor([200])),
]


def inputs(n_q, n_k, d, block_q, block_k, dtype, device="cpu", keep=0.4):
    q, k, v = (
        (torch.randn(1, n, 2, d) + 0.3).to(device, dtype).transpose(1, 2) for n in (n_q, n_k, n_k)
    )
    mask = torch.rand(1, 2, block_count(n_q, block_q), block_count(n_k, block_k)) < keep
    table = BlockTable.from_mask(mask.to(device), block_q, block_k, n_q, n_k)
    weight, bias = torch.randn(d, d, device=device) / d**0.5, torch.randn(d, device=device)
    return q, k, v, table, weight, bias


def leaves_of(dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().to(dtype).requires_grad_() for x in tensors]


def check_backward(args: tuple, grad: torch.Tensor) -> None:
    """args: q, k, v, excluded, weight, feature map and kv_len."""
    q, k, v, excluded, weight, *rest = args
    found = triton.linear_branch_backward(grad, *args)

    def naive(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        *x, w = leaves_of(dtype, q, k, v, weight)
        base = torch.zeros_like(q, dtype=dtype)
        out = reference.linear_branch(base, *x, excluded, w, None, *rest, dtype=dtype)
        return torch.autograd.grad(out, (*x, w), grad.to(dtype))

    for name, *x in zip(
        ("dq", "dk", "dv", "dw"), found, naive(WIDER[q.dtype]), naive(q.dtype), strict=True
    ):
        assert_close(name, *x)


@pytest.mark.parametrize("mode", ["all", "rest"])
@pytest.mark.parametrize("case,kv_len", CASES, ids=str)
def test_forward(case, kv_len, mode: str, device: str):
    q, k, v, table, weight, bias = inputs(*case, device)
    kv_len = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    excluded = table if mode == "rest" else None
    args = (q, k, v, table, weight, bias, "softmax", excluded, None, kv_len)
    out = triton.sparse_linear_attention(*args)
    assert_close("out", out, *references(reference.sparse_linear_attention, *args))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_feature_maps(feature_map: str, device: str):
    q, k, v, table, weight, _ = inputs(65, 100, 64, 64, 32, torch.float32, device)
    args = (q, k, v, table, weight, None, feature_map, table)
    out = triton.sparse_linear_attention(*args)
    assert_close("out", out, *references(reference.sparse_linear_attention, *args))


def test_a_row_that_excludes_everything_has_no_linear_part(device: str):
    q, k, v, table, weight, _ = inputs(65, 100, 64, 64, 32, torch.float32, device, keep=2)
    base = torch.randn_like(q)
    assert torch.equal(triton.linear_branch(base, q, k, v, table, weight), base)


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_parts_of_the_heads_give_the_same_bits(dtype: torch.dtype, device: str, monkeypatch):
    q, k, v, table, weight, bias = inputs(65, 100, 64, 64, 32, dtype, device)
    q, k, v = (torch.cat((x, x.flip(2))) for x in (q, k, v))
    rows = (torch.cat((x, x.flip(1))) for x in (table.indices, table.counts))
    table = BlockTable(*rows, 64, 32, 65, 100)
    kv_len, grad = torch.tensor([100, 70], device=device), torch.randn_like(q)
    check_backward((q, k, v, table, weight, "elu", kv_len), grad)

    def run() -> tuple[torch.Tensor, ...]:
        out = triton.linear_branch(grad, q, k, v, table, weight, bias, "elu", kv_len)
        return out, *triton.linear_branch_backward(grad, q, k, v, table, weight, "elu", kv_len)

    whole = run()
    monkeypatch.setattr(states, "_MEMORY", 0)
    assert len(list(states.parts(k, table))) == 2
    assert all(map(torch.equal, run(), whole))


@pytest.mark.parametrize("mode", ["all", "rest"])
def test_features_that_never_meet_stay_finite(mode: str, device: str):
    q, k, v, table, weight, _ = inputs(65, 100, 64, 64, 32, HALF, device)
    q[..., 0], k[..., 0] = 30, -30
    excluded = table if mode == "rest" else None
    out = triton.linear_branch(torch.zeros_like(q), q, k, v * 100, excluded, weight)
    grads = triton.linear_branch_backward(q, q, k, v * 100, excluded, weight)
    assert all(x.isfinite().all() for x in (out, *grads))


def test_the_mean_of_the_values_is_taken_off_unrounded(device: str):
    """Values of one size would all lose the same where a small mean is taken off each."""
    q, k, v, _, weight, _ = inputs(64, 60, 64, 64, 32, HALF, device)
    v = torch.randint(2, v.shape, device=device).to(HALF) * 2 - 1
    args = (torch.ones_like(q), q, k, v, None, weight)
    *_, dw = triton.linear_branch_backward(*args)
    *_, naive = reference.linear_branch_backward(*args)
    assert (dw - naive).norm() < 2e-4 * naive.norm()


def test_padding_is_never_read(device: str):
    q, k, v, table, weight, _ = inputs(65, 100, 64, 64, 32, torch.float32, device)
    base = torch.randn_like(q)
    expected = reference.linear_branch(base, q, k, v, table, weight, kv_len=70)
    k[:, :, 70:], v[:, :, 70:] = torch.nan, torch.nan
    out = triton.linear_branch(base, q, k, v, table, weight, kv_len=70)
    torch.testing.assert_close(out, expected)
    for excluded in (None, table):
        grads = triton.linear_branch_backward(q, q, k, v, excluded, weight, kv_len=70)
        assert all(x.isfinite().all() for x in grads)
        assert not any(x[:, :, 70:].any() for x in grads[1:3])


@pytest.mark.parametrize("mode", ["all", "rest"])
@pytest.mark.parametrize("case,kv_len", CASES, ids=str)
def test_backward(case, kv_len, mode: str, device: str):
    q, k, v, table, weight, _ = inputs(*case, device)
    kv_len = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    excluded = table if mode == "rest" else None
    check_backward((q, k, v, excluded, weight, "softmax", kv_len), torch.randn_like(q))


@pytest.mark.parametrize("mode", ["all", "rest"])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_backward_of_values_far_from_zero(
    dtype: torch.dtype, feature_map: str, mode: str, device: str
):
    q, k, v, table, weight, _ = inputs(65, 300, 64, 64, 32, dtype, device)
    excluded = table if mode == "rest" else None
    check_backward((q, k, v + 3, excluded, weight, feature_map, None), torch.randn_like(q))


@pytest.mark.parametrize("kv_len", [None, 90, 500, torch.tensor([130, 0])], ids=str)
@pytest.mark.parametrize("d", [64, 80, 128])
def test_the_projected_state_of_all_keys(d: int, kv_len, device: str):
    _, k, v, _, weight, _ = inputs(65, 200, d, 64, 64, HALF, device)
    if isinstance(kv_len, torch.Tensor):
        k, v, kv_len = (torch.cat([k, 2 * v]), torch.cat([v, k]), kv_len.to(device))
    ends = torch.as_tensor(200 if kv_len is None else kv_len).expand(len(k)).tolist()
    for b, end in enumerate(ends):
        k[b, :, end:] = v[b, :, end:] = torch.nan
    state, total = triton.projected_state(k, v, weight, "softmax", kv_len)
    assert state.is_contiguous() and total.is_contiguous()
    share = key_share(k, kv_len)
    assert share == 1 / (200 if kv_len is None or len(k) == 2 else min(kv_len, 200))
    for b, end in enumerate(ends):
        fk, fv = k[b, :, :end].float().softmax(-1), v[b, :, :end].float()
        torch.testing.assert_close(total[b], fk.sum(1) * share, rtol=2e-3, atol=1e-5)
        expected = fk.mT @ fv @ weight.mT * share
        torch.testing.assert_close(state[b].float(), expected, rtol=2e-3, atol=1e-5)


def test_without_its_gpu_no_kernel_adds_the_branch(device: str):
    q, k, v, table, *_ = inputs(65, 100, 64, 64, 64, HALF)
    launch = triton.find("forward", 90, 64, 128)
    assert launch.specialized
    assert "launch table" in triton.unfused(q, k, v, q, None, table, launch, None, None)
