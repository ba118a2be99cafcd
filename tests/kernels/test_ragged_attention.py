"""Attention over tiles of unequal length against the naive one: torch, Triton, gradients."""

import pytest
import torch

from dit_accel import ops
from dit_accel.kernels.ragged_attention import reference
from dit_accel.kernels.ragged_attention import torch as plain
from dit_accel.kernels.ragged_attention import triton as kernel
from dit_accel.table import BlockTable
from dit_accel.testing import assert_close, references

HALF = torch.float16
# tiles of queries, tiles of keys, block, D, dtype
CASES = [
    ((1,), (1,), 64, 64, torch.float32),
    ((64, 64), (64, 16, 64), 64, 64, torch.float32),
    ((5, 64, 33, 1), (64, 7, 64, 64, 20), 64, 80, HALF),
    ((64, 10), (128, 3, 100), 128, 96, torch.float32),
    ((64, 16, 4) * 3, (64, 16, 4) * 3, 64, 128, HALF),
]


def inputs(q_tiles, k_tiles, block, d, dtype, device="cpu", batch=2, keep=0.6):
    q, k, v, gate = (
        torch.randn(batch, n, 2, d).to(device, dtype).transpose(1, 2)
        for n in (sum(q_tiles), sum(k_tiles), sum(k_tiles), sum(q_tiles))
    )
    mask = torch.rand(batch, 2, len(q_tiles), len(k_tiles)) < keep
    mask[..., 0] |= ~mask.any(-1)
    sizes = (block, block, block * len(q_tiles), block * len(k_tiles))
    table = BlockTable.from_mask(mask.to(device), *sizes)
    bounds = [torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (q_tiles, k_tiles)]
    coarse = torch.randn(batch, 2, len(q_tiles), d).to(device)
    return (q, k, v, table, *bounds), (gate, coarse)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("module", [plain, kernel])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case, module, gated, device):
    call, (gate, coarse) = inputs(*case, device)
    more = (0.2, gate, coarse) if gated else (0.2,)
    wide, same = references(reference.ragged_attention, *call, *more)
    indices, whole = ops.ragged._whole_first(call[3], call[5])
    table = BlockTable(indices, call[3].counts, *sizes_of(call[3]))
    for given in ({}, {"whole": whole}):
        own = call if not given else (*call[:3], table, *call[4:])
        out = module.ragged_attention(*own, *more, **given)
        assert_close("out", out[0], wide[0], same[0])
        assert_close("lse", out[1], wide[1], same[1].float())


def sizes_of(table):
    return table.block_q, table.block_k, table.n_q, table.n_k


@pytest.mark.parametrize("module", [plain, kernel])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case, module, device):
    (q, k, v, table, *bounds), _ = inputs(*case, device)
    out, lse = reference.ragged_attention(q, k, v, table, *bounds)
    grad, grad_lse = torch.randn_like(q), torch.randn_like(lse)
    call = (grad, grad_lse, q, k, v, out, lse, table, *bounds, 0.2)
    for name, ours, naive in zip(
        "qkv", module.backward(*call), reference.backward(*call), strict=True
    ):
        tolerance = 2e-2 if q.dtype == HALF else 1e-4
        torch.testing.assert_close(ours, naive, rtol=tolerance, atol=tolerance, msg=f"d{name}")


@pytest.mark.parametrize("module", [plain, kernel])
def test_means_are_over_the_true_number_of_tokens(module, device):
    (q, *_, bounds, _), _ = inputs((5, 64, 33, 1), (64,), 64, 80, HALF, device)
    expected = reference.tile_means(q, bounds)
    torch.testing.assert_close(module.tile_means(q, bounds), expected, rtol=1e-4, atol=1e-4)


def test_the_operators_have_gradients():
    call, learned = inputs((7, 64, 20), (64, 16, 5), 64, 64, torch.float64, batch=1)
    q, k, v, table, *bounds = call
    q, k, v = (x.float().requires_grad_() for x in (q, k, v))
    gate, coarse = (x.float().requires_grad_() for x in learned)
    weight = torch.randn(q.shape)
    grads = []
    for fn in (ops.ragged_attention, lambda *a: reference.ragged_attention(*a)[0]):
        out = fn(q, k, v, table, *bounds, 0.3, gate, coarse)
        grads.append(torch.autograd.grad((out * weight).sum(), (q, k, v, gate, coarse)))
    for ours, naive in zip(*grads, strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=1e-5)
    means = [fn(q, bounds[0]) for fn in (ops.tile_means, reference.tile_means)]
    grads = [torch.autograd.grad(m.square().sum(), q)[0] for m in means]
    torch.testing.assert_close(*grads)


def test_one_node_under_compile_and_no_gradient_is_lost_there():
    call, learned = inputs((64, 20), (64, 16), 64, 64, torch.float32)
    ours = torch.compile(ops.ragged_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        ours(*call, 0.2, *learned), ops.ragged_attention(*call, 0.2, *learned)
    )
    tests = ("test_schema", "test_faketensor")
    q, k, v, table, *bounds = call
    indices, whole = ops.ragged._whole_first(table, bounds[1])
    args = (q, k, v, indices, table.counts, whole, *bounds, None, None, 64, 64, 0.2)
    torch.library.opcheck(ops.ragged._ragged, args, test_utils=tests)
    torch.library.opcheck(ops.ragged._tile_means, (q, bounds[0]), test_utils=tests)


def test_what_does_not_fit_is_refused():
    (q, k, v, table, a, b), (gate, coarse) = inputs((64, 20), (64, 16, 3), 64, 64, torch.float32)
    for bad, why in (
        ((q, k, v, table, a.long(), b), r"q_bounds is int32 \[M \+ 1\]"),
        ((q, k, v, table, a, a), "k_bounds has 3 entries, and the table asks for 4"),
        ((q, k, v, table, a, b, None, gate), "a gate and what it weighs come together"),
        ((q, k, v, table, a, b, None, gate, coarse[:, :, :1]), "gate is like q"),
    ):
        with pytest.raises(ValueError, match=why):
            ops.ragged_attention(*bad)
