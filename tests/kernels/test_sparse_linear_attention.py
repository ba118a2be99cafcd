"""Sparse-linear attention against the naive one: every mode, gradients, and what must be exact."""

import pytest
import torch

from dit_accel import ops
from dit_accel.kernels.sparse_linear_attention import reference
from dit_accel.kernels.sparse_linear_attention import torch as fast
from dit_accel.kernels.sparse_linear_attention.features import FEATURE_MAPS
from dit_accel.ops import dispatch
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import assert_close, references

MODES = ["all", "rest"]


def inputs(n_q: int, n_k: int, d: int, dtype: torch.dtype = torch.float32, keep: float = 0.4):
    q = torch.randn(2, n_q, 2, d).to(dtype).transpose(1, 2)
    k, v = (torch.randn(2, 2, n_k, d).to(dtype) for _ in range(2))
    mask = torch.rand(2, 2, block_count(n_q, 64), block_count(n_k, 64)) < keep
    table = BlockTable.from_mask(mask, 64, 64, n_q, n_k)
    return q, k, v, table, torch.randn(d, d) / d**0.5, torch.randn(d)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_q,n_k,d", [(1, 1, 64), (63, 65, 80), (65, 63, 128), (300, 200, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward(mode: str, n_q: int, n_k: int, d: int, dtype: torch.dtype):
    q, k, v, table, weight, bias = inputs(n_q, n_k, d, dtype)
    excluded = table if mode == "rest" else None
    args = (q, k, v, table, weight, bias, "softmax", excluded)
    wide, same = references(reference.sparse_linear_attention, *args)
    assert_close("out", fast.sparse_linear_attention(*args), wide, same)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("kv_len", [None, 100, torch.tensor([150, 37])])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("module", [reference, fast], ids=["reference", "torch"])
def test_backward(module, mode: str, kv_len: int | torch.Tensor | None, feature_map: str):
    q, k, v, table, weight, bias = inputs(130, 150, 24)
    excluded = table if mode == "rest" else None
    grad = torch.randn_like(q)

    def gradients(dtype: torch.dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v, weight)]
        base = torch.zeros(q.shape, dtype=dtype)
        out = reference.linear_branch(
            base, *leaves[:3], excluded, leaves[3], bias, feature_map, kv_len, dtype=dtype
        )
        return torch.autograd.grad(out, leaves, grad.to(dtype))

    found = module.linear_branch_backward(grad, q, k, v, excluded, weight, feature_map, kv_len)
    names = ("dq", "dk", "dv", "dw")
    for name, *x in zip(
        names, found, gradients(torch.float64), gradients(torch.float32), strict=True
    ):
        assert_close(name, *x)


@pytest.mark.parametrize("linear", ["all", "rest", "marginal"])
def test_the_operator_is_differentiable_and_fits_its_equations(linear: str):
    q, k, v, table, weight, bias = inputs(200, 330, 32)
    skip = ops.block_table(-q, k, 0.3)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weight, bias)]
    out = ops.sparse_linear_attention(*leaves[:3], table, *leaves[3:], linear=linear, skip=skip)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    mask = {"all": 0, "rest": table.to_mask(), "marginal": table.to_mask() | skip.to_mask()}[linear]
    excluded = None if linear == "all" else BlockTable.from_mask(mask, 64, 64, 200, 330)

    def naive(dtype: torch.dtype):
        x = [y.detach().to(dtype).requires_grad_() for y in leaves]
        y = reference.sparse_linear_attention(*x[:3], table, *x[3:], excluded=excluded, dtype=dtype)
        return y, torch.autograd.grad(y, x, grad.to(dtype))

    (wide, wide_grads), (same, same_grads) = naive(torch.float64), naive(torch.float32)
    assert_close("out", out, wide, same)
    for name, *x in zip(
        ("q", "k", "v", "weight", "bias"), found, wide_grads, same_grads, strict=True
    ):
        assert_close(f"d{name}", *x)


def test_without_a_weight_it_is_the_sparse_operator_and_the_branch_does_not_run():
    q, k, v, table, *_ = inputs(200, 330, 32)
    with dispatch.recording() as used:
        out = ops.sparse_linear_attention(q, k, v, table)
    assert torch.equal(out, ops.block_sparse_attention(q, k, v, table))
    assert [name.split("/")[0] for name in used] == ["block_sparse_attention"]


def test_a_zero_weight_adds_nothing():
    q, k, v, table, weight, _ = inputs(200, 330, 32)
    out = ops.sparse_linear_attention(q, k, v, table, torch.zeros_like(weight))
    assert torch.equal(out, ops.block_sparse_attention(q, k, v, table))


@pytest.mark.parametrize("module", [reference, fast], ids=["reference", "torch"])
def test_a_row_that_excludes_everything_has_no_linear_part(module):
    q, k, v, _, weight, _ = inputs(130, 200, 32)
    full = BlockTable.from_mask(torch.ones(2, 2, 3, 4, dtype=torch.bool), 64, 64, 130, 200)
    base = torch.randn_like(q)
    assert torch.equal(module.linear_branch(base, q, k, v, full, weight), base)


@pytest.mark.parametrize("module", [reference, fast], ids=["reference", "torch"])
def test_padding_is_never_read(module):
    q, k, v, table, weight, bias = inputs(130, 200, 32)
    k[:, :, 100:], v[:, :, 100:] = torch.nan, torch.nan
    short = ops.sparse_linear_attention(
        q, k[:, :, :100], v[:, :, :100], ops.block_table(q, k[:, :, :100], 1.0), weight, bias
    )
    table = ops.block_table(q, k, 1.0, kv_len=100)
    out = module.sparse_linear_attention(q, k, v, table, weight, bias, kv_len=100)
    torch.testing.assert_close(out, short)


def test_torch_library_finds_no_fault():
    q, k, v, table, weight, bias = inputs(65, 70, 16)
    sizes = (table.indices, table.counts, 64, 64)
    leaves = [x.detach().requires_grad_() for x in (torch.randn_like(q), q, k, v)]
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    args = (*leaves, *sizes, weight, bias, "softmax", None, 50)
    torch.library.opcheck(torch.ops.dit_accel.linear_branch.default, args)
    args = (q, k, v, *sizes, weight.detach(), bias.detach(), "softmax", 0.25, None, 50)
    torch.library.opcheck(torch.ops.dit_accel.sparse_linear_attention.default, args)


@pytest.mark.parametrize("kv_len", [None, 50])
def test_inference_is_one_call_with_the_result_of_training(kv_len: int | None):
    q, k, v, table, weight, bias = inputs(65, 70, 16)
    args = (q, k, v, table, weight, bias)
    with dispatch.recording() as used:
        out = ops.sparse_linear_attention(*args, kv_len=kv_len)
    assert [name.split("/")[0] for name in used] == ["sparse_linear_attention"]
    learned = ops.sparse_linear_attention(*args[:4], weight.requires_grad_(), bias, kv_len=kv_len)
    assert learned.requires_grad and not out.requires_grad
    torch.testing.assert_close(out, learned.detach())


def test_wrong_arguments_are_named():
    q, k, v, table, weight, bias = inputs(65, 70, 16)
    run = ops.sparse_linear_attention
    for match, options in (
        ("linear is", {"linear": "some"}),
        ("feature_map is", {"feature_map": "tanh"}),
        (r"weight is \[16, 16\]", {"weight": torch.randn(8, 8)}),
        ("linear=None", {"weight": weight, "linear": None}),
        ("a bias goes with a weight", {"bias": bias}),
        ("needs `skip`", {"weight": weight, "linear": "marginal"}),
    ):
        with pytest.raises(ValueError, match=match):
            run(q, k, v, table, **options)
