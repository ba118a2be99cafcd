"""Every Triton kernel against its reference in the dtype of the GPU; gpu_kernels.py runs these."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from gpu_run import Plan, Run, random_table

from dit_accel import ops
from dit_accel.kernels.block_sparse_attention import reference
from dit_accel.kernels.block_sparse_attention import triton as sparse
from dit_accel.kernels.block_table import reference as table_reference
from dit_accel.kernels.block_table import triton as tables
from dit_accel.kernels.block_table.means import block_means
from dit_accel.kernels.pooled_attention import reference as pooled_reference
from dit_accel.kernels.pooled_attention import triton as pooled
from dit_accel.kernels.rectified_attention import reference as rectified_reference
from dit_accel.kernels.rectified_attention import triton as rectified
from dit_accel.kernels.sparse_linear_attention import reference as linear_reference
from dit_accel.kernels.window_attention import reference as window_reference
from dit_accel.kernels.window_attention import triton as window
from dit_accel.ops import dispatch
from dit_accel.table import BlockTable
from dit_accel.testing import WIDER, assert_close, references


def check_forward(
    r: Run, n_q: int, n_k: int, d: int, block_q: int, block_k: int, heads: int = 2
) -> dict[str, Any]:
    q, k, v = (r.tokens(1, heads, n, d) for n in (n_q, n_k, n_k))
    table = random_table(r, q, n_k, block_q, block_k, 0.5)
    errors = {}
    for name, op, ref in (
        ("sparse", sparse.block_sparse_attention, reference.block_sparse_attention),
        ("pooled", pooled.pooled_attention, pooled_reference.pooled_attention),
        ("rectified", rectified.rectified_attention, rectified_reference.rectified_attention),
    ):
        out, (wide, same) = op(q, k, v, table), references(ref, q, k, v, table)
        assert_close(name, out, wide, same)
        errors[name] = (out.float() - wide).norm().item() / wide.norm().item()
    return {"relative_error": errors}


def check_backward(r: Run, n: int, d: int, block: int, op: str) -> dict[str, Any]:
    forward, backward, ref = {
        "sparse": (
            sparse.block_sparse_attention, sparse.backward, reference.block_sparse_attention
        ),
        "pooled": (pooled.pooled_attention, pooled.backward, pooled_reference.pooled_attention),
    }[op]  # fmt: skip
    q, k, v, grad = (r.tokens(1, 2, n, d) for _ in range(4))
    table = random_table(r, q, n, block, block, 0.5)
    out, lse = forward(q, k, v, table, return_lse=True)
    grads = backward(grad, None, q, k, v, out, lse, table)
    expected = []
    for dtype in (WIDER[q.dtype], q.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        result = ref(*leaves, table, dtype=dtype)
        expected.append(torch.autograd.grad(result, leaves, grad.to(dtype)))
    for name, *tensors in zip(("dq", "dk", "dv"), grads, *expected, strict=True):
        assert_close(name, *tensors)
    return {"checked": "dq dk dv"}


def check_table(r: Run, n: int, d: int, keep: float) -> dict[str, Any]:
    """The kernel's choice against the naive one: equal, or equal in score where they differ."""
    q, k = r.tokens(1, 2, n, d), r.tokens(1, 2, n, d)
    ours, naive = tables.block_table(q, k, keep), table_reference.block_table(q, k, keep)
    assert torch.equal(ours.counts, naive.counts)
    scores = block_means(q, 64)[0] @ block_means(k, 64)[0].mT
    sums = [(t.to_mask() * scores).sum(-1) for t in (ours, naive)]
    torch.testing.assert_close(*sums, atol=1e-4, rtol=1e-4)
    return {"rows_that_differ": (ours.to_mask() != naive.to_mask()).any(-1).sum().item()}


def check_linear(r: Run, n: int, d: int, block_q: int, mode: str) -> dict[str, Any]:
    """The operator as it is registered: its result, and the gradients that autograd finds."""
    q, k, v, grad = (r.tokens(1, 2, n, d) for _ in range(4))
    table, skip = (random_table(r, q, n, block_q, 64, keep) for keep in (0.5, 0.2))
    weight = torch.randn(d, d, device=r.device) / d**0.5
    leaves = [x.detach().requires_grad_() for x in (q, k, v, weight)]
    options = {"linear": mode, "skip": skip if mode == "marginal" else None}
    with dispatch.recording() as used:
        out = ops.sparse_linear_attention(*leaves[:3], table, leaves[3], **options)
        grads = torch.autograd.grad(out, leaves, grad)
    assert all(name.endswith("/triton") for name in used), used
    mask = table.to_mask() | skip.to_mask() if mode == "marginal" else table.to_mask()
    excluded = None if mode == "all" else BlockTable.from_mask(mask, block_q, 64, n, n)
    found = []
    for dtype in (WIDER[q.dtype], q.dtype):
        *x, w = (y.detach().to(dtype).requires_grad_() for y in leaves)
        ref = linear_reference.sparse_linear_attention
        result = ref(*x, table, w, excluded=excluded, dtype=dtype)
        found.append((result, *torch.autograd.grad(result, (*x, w), grad.to(dtype))))
    errors = {}
    for name, x, wide, same in zip(
        ("out", "dq", "dk", "dv", "dw"), (out, *grads), *found, strict=True
    ):
        assert_close(name, x, wide, same)
        errors[name] = ((x.float() - wide).norm() / wide.norm()).item()
    return {"relative_error": errors}


def check_window(r: Run, n: int, d: int, block_q: int) -> dict[str, Any]:
    q, k, v = (r.tokens(1, 2, n, d) for _ in range(3))
    table = random_table(r, q, n, block_q, 64, 0.5)
    outs = window.window_attention(q, k, v, table)
    wide, same = references(window_reference.window_attention, q, k, v, table)
    for name, *tensors in zip(("full", "window"), outs, wide, same, strict=False):
        assert_close(name, *tensors)
    return {"checked": "full window"}


def checks(r: Run) -> Plan:
    """Every head dimension and block size, short and ragged lengths, and one video's length."""
    lengths = [(1, 1), (63, 65), (64, 64), (1000, 1000), (4096, 4100)]
    kinds = [(d, 64, 64) for d in (64, 80, 96, 128)]
    kinds += [(d, 128, block_k) for d in (64, 128) for block_k in (64, 128)]
    if r.dry:
        lengths, kinds = [(65, 63)], kinds[:1]
    plan: Plan = []
    n, d = (200, 64) if r.dry else (32760, 128)
    plan.append(("check table", lambda: check_table(r, n, d, 0.1)))
    plan.append((f"check forward {n}", lambda: check_forward(r, n, n, d, 64, 64, heads=1)))
    for kind in kinds:
        for n_q, n_k in lengths:
            name = f"check forward {n_q}x{n_k} d{kind[0]} blocks {kind[1]}x{kind[2]}"
            plan.append((name, lambda a=(n_q, n_k, *kind): check_forward(r, *a)))
    few = 70 if r.dry else 1000
    for d_, block, _ in [kind for kind in kinds if kind[2] == kind[1]]:
        for op in ("sparse", "pooled"):
            name = f"check backward d{d_} block {block} {op}"
            plan.append((name, lambda a=(few, d_, block, op): check_backward(r, *a)))
    for d_ in sorted({kind[0] for kind in kinds}):
        blocks = sorted({kind[1] for kind in kinds if kind[0] == d_})
        for block_q, mode in product(blocks, ("all", "rest", "marginal")):
            name = f"check linear d{d_} block_q {block_q} {mode}"
            plan.append((name, lambda a=(few, d_, block_q, mode): check_linear(r, *a)))
        for block in (64, 128):
            name = f"check window d{d_} block {block}"
            plan.append((name, lambda a=(few, d_, block): check_window(r, *a)))
    return plan
