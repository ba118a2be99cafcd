"""The Hopper gradients: emulated with their roles in random order, compiled, and on a GPU."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compiling import compiled
from gluon_emulator import emulated
from gluon_machine import Deadlock

from dit_accel.kernels.block_sparse_attention import gluon_backward as hopper
from dit_accel.kernels.block_sparse_attention import reference
from dit_accel.kernels.block_sparse_attention import triton_backward as plain
from dit_accel.kernels.block_table.transpose import transpose_table
from dit_accel.kernels.launch import LAUNCHES, find
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import assert_close

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
TEXT = Path(hopper.__file__).with_name("gluon_backward_kernel.py")
NAME = "_block_sparse_attention_hopper_bwd_{}_kernel"
EMULATED = {op: emulated(TEXT, NAME.format(op)) for op in ("dq", "dkdv")}
HALF = torch.float16
CASES = [
    # n_q, n_k, d, block_q, block_k, stages, programs
    (5, 3, 64, 128, 64, 2, 1),
    (150, 200, 128, 128, 128, 2, 2),
    (150, 130, 64, 64, 64, 2, 3),
    (200, 129, 64, 64, 128, 3, 2),
]
# Each breaks the protocol of a kernel in one place.
ERRORS = [
    ("mbarrier.arrive(empty.index(st), count=1)\n            g += 1", "g += 1"),
    ("mbarrier.arrive(empty.index(st), count=1)\n    return", "return"),
    ("mbarrier.init(empty.index(i), count=PARTS)", "mbarrier.init(empty.index(i), count=1)"),
    ("mbarrier.init(held_empty, count=PARTS)", "mbarrier.init(held_empty, count=1)"),
    ("mbarrier.wait(empty.index(st), (g // STAGES & 1) ^ 1)", "pass"),
    ("        mbarrier.wait(held_empty, phase ^ 1)\n        phase", "        phase"),
    ("count=2 if STATS else 1", "count=1"),
    ("mbarrier.init(held_full, count=2)", "mbarrier.init(held_full, count=1)"),
    (
        "(i_m * PARTS + PART) * 64)\n        mbarrier.wait(held_full, phase)",
        "(i_m * PARTS + PART) * 64)",
    ),
    ("mbarrier.expect(full.index(st), 64 * D * 4)", "mbarrier.expect(full.index(st), 64 * D * 2)"),
    ("b_dp = warpgroup_mma_wait(1, (p_token,))", "b_dp = warpgroup_mma_wait(2, (p_token,))"),
    ("b_dq = warpgroup_mma_wait(0, (q_token,))", "b_dq = warpgroup_mma_wait(1, (q_token,))"),
    ("b_dq = warpgroup_mma_wait(2, (q_token,))", "b_dq = warpgroup_mma_wait(3, (q_token,))"),
    ("mbarrier.wait(ds_full.index(g & 1), g >> 1 & 1)", "pass"),
    ("mbarrier.wait(ds_empty.index(g & 1), (g + 1) // 2 + 1 & 1)", "pass"),
    ("mbarrier.arrive(ds_empty.index((g & 1) ^ 1), count=1)", "pass"),
    ("mbarrier.init(ds_empty.index(i), count=2)", "mbarrier.init(ds_empty.index(i), count=1)"),
    ("gl.where(n_before > 0, b_dq, 0.0)", "b_dq"),
    ("mbarrier.init(ds_full.index(i), count=2)", "mbarrier.init(ds_full.index(i), count=1)"),
    ("    tma.store_wait(0)\n    o_s", "    o_s"),
]


def inputs(n_q, n_k, d, block_q, block_k, dtype=HALF, device="cpu", keep=0.5):
    """q, k, v, the gradient of the output and a table whose first row is empty."""
    lengths = (n_q, n_k, n_k, n_q)
    q, k, v, grad = (torch.randn(1, n, 2, d).to(device, dtype).transpose(1, 2) for n in lengths)
    mask = torch.rand(1, 2, block_count(n_q, block_q), block_count(n_k, block_k)) < keep
    mask[0, 0, 0] = False
    return q, k, v, grad, BlockTable.from_mask(mask.to(device), block_q, block_k, n_q, n_k)


def emulate(case, q, k, v, grad, table, kv_len=None, dlse=None, one=False, seed=0, run=None):
    """dq, dk and dv of the emulated kernels: of both, or of the one that makes all three."""
    run = {**EMULATED, **(run or {})}
    out, lse = reference.block_sparse_attention(q, k, v, table, None, True, kv_len)
    *_, stages, programs = case
    row = replace(hopper.CANDIDATES[0], stages=stages)
    x = hopper.prepare(grad, dlse, q, k, v, out, lse, table, None, kv_len)
    grads = [torch.full_like(y, torch.nan) for y in (q, k, v)]
    total = hopper.total_of(x) if one else None
    calls = {"dkdv": hopper.dkdv_launch(x, row, transpose_table(table), *grads[1:], total)}
    if not one:
        calls["dq"] = hopper.dq_launch(x, row, grads[0])
    for op, (grid, arguments, _) in calls.items():
        run[op](arguments, min(programs, *grid), seed)
    if one:
        hopper.finish(x, total, grads[0])
    return grads


def expected(q, k, v, grad, table, kv_len=None, dlse=None):
    """dq, dk and dv in float32, and in the dtype of q."""
    for dtype in (torch.float32, q.dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        outs = reference.block_sparse_attention(*leaves, table, None, True, kv_len, dtype=dtype)
        loss = (outs[0] * grad.to(dtype)).sum()
        if dlse is not None:
            loss = loss + (outs[1] * dlse.to(dtype)).where(outs[1].isfinite(), 0).sum()
        yield torch.autograd.grad(loss, leaves)


def check(grads, *args):
    for name, *tensors in zip(("dq", "dk", "dv"), grads, *expected(*args), strict=True):
        assert_close(name, *tensors)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("one", [False, True])
def test_any_order_of_the_roles_gives_the_gradients(case, seed, one):
    if one and case[4] == 64:
        return  # two rows, which do not share dS
    args = inputs(*case[:5])
    check(emulate(case, *args, seed=102 * seed, one=one), *args)


@pytest.mark.parametrize("one", [False, True])
def test_keys_beyond_kv_len_have_no_gradient_and_that_of_lse_counts(one):
    case = (100, 200, 64, 64, 128, 2, 2)
    q, k, v, grad, table = inputs(*case[:5])
    k[:, :, 130:], v[:, :, 130:] = torch.nan, torch.nan
    dlse = torch.randn(q.shape[:3])
    grads = emulate(case, q, k, v, grad, table, 130, dlse, one)
    check(grads, q, k, v, grad, table, 130, dlse)
    assert not grads[1][:, :, 130:].any() and not grads[2][:, :, 130:].any()


def test_tokens_that_are_zero_add_nothing_where_exp_of_minus_lse_is_infinite():
    case = (70, 70, 64, 128, 128, 2, 1)
    q, k, v, grad, table = inputs(*case[:5], keep=2.0)
    k = q * -8  # logits of -64 and less: beyond the range of float32 as weights of keys at zero
    q *= 4
    args = (q, k, v, grad, table)
    for one in (False, True):
        check(emulate(case, *args, one=one), *args)


@pytest.mark.parametrize("keep", [0.0, 2.0])
def test_rows_of_no_block_and_of_all(keep):
    case = (150, 130, 64, 128, 128, 2, 1)
    args = inputs(*case[:5], keep=keep)
    for one in (False, True):
        check(emulate(case, *args, one=one), *args)


def test_pooled_keys_hand_their_tokens_their_share():
    q, k, v, grad, table = inputs(64, 200, 64, 64, 128)
    out, lse = reference.block_sparse_attention(q, k, v, table, None, True, 150)
    x = hopper.prepare(grad, None, q, k, v, out, lse, table, 0.25, 150)
    pools = torch.randn(2, 1, 2, 64, 64)
    made = []
    for given in (None, (pools[0], pools[1])):
        grads = torch.empty_like(k), torch.empty_like(v)
        row = hopper.CANDIDATES[0]
        _, arguments, _ = hopper.dkdv_launch(x, row, transpose_table(table), *grads, None, given)
        EMULATED["dkdv"](arguments, 1)
        made.append(torch.stack(grads).float())
    share = torch.tensor([128.0] * 128 + [22.0] * 22)[:, None]
    wanted = (
        pools[:, :, :, [0] * 128 + [1] * 22] / share * torch.tensor([0.25, 1.0]).view(2, 1, 1, 1, 1)
    )
    torch.testing.assert_close(
        made[1][..., :150, :] - made[0][..., :150, :], wanted, atol=5e-3, rtol=0
    )
    assert not made[1][..., 150:, :].any()


@pytest.mark.parametrize("change", ERRORS, ids=lambda pair: pair[0][:45])
def test_an_error_in_the_protocol_is_noticed(change):
    broken = {op: emulated(TEXT, NAME.format(op), change) for op in EMULATED}
    case = (320, 100, 64, 128, 128, 2, 1)
    args = inputs(*case[:5], keep=2.0)
    one = "ds_" in change[0] or "b_dq, 0.0" in change[0]
    noticed = False
    for seed in range(12):
        try:
            check(emulate(case, *args, seed=seed, one=one or seed % 2 == 1, run=broken), *args)
        except (AssertionError, Deadlock):
            noticed = True
            break
    assert noticed


@pytest.mark.parametrize("block_k,same,names", [
    (128, False, ["stats", "dkdv", "sum"]),
    (128, True, ["stats", "dq", "dkdv"]),
    (64, False, ["stats", "dq", "dkdv"]),
])  # fmt: skip
def test_one_kernel_makes_all_unless_the_bits_must_be_the_same(monkeypatch, block_k, same, names):
    ran, real = [], hopper.run

    def run(kernel, grid, arguments, launch):
        name = kernel.fn.__name__.removesuffix("_kernel").split("_")[-1]
        ran.append(name)
        if name in EMULATED:
            EMULATED[name](arguments, *grid)
        else:
            real(kernel, grid, arguments, launch)

    rows = {row.op: row for row in hopper.CANDIDATES}
    monkeypatch.setattr(hopper, "run", run)
    monkeypatch.setattr(hopper, "find", lambda op, *_: rows[op])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: same)
    q, k, v, grad, table = inputs(70, 150, 64, 64, block_k)
    out, lse = reference.block_sparse_attention(q, k, v, table, None, True)
    grads = hopper.backward(grad, None, q, k, v, out, lse, table)
    assert ran == names
    check(grads, q, k, v, grad, table)


def test_the_launch_table_has_the_fastest_of_them():
    measured = json.loads((RESULTS / "h200-backward.json").read_text())["runs"]
    milliseconds = next(
        case["ms"]
        for case in measured[-1]["cases"]
        if case["case"] == "kernels wan1.3b-480p keep 0.05 blocks 128x128"
    )
    fastest = {
        op: min((x for x in milliseconds if x.startswith(f"{op},")), key=milliseconds.get)
        for op in ("gradients", "dq", "dkdv")
    }
    rows = [row for row in LAUNCHES if row.specialized and row.op in fastest]
    for row in rows:
        assert replace(row, provenance="a candidate") in hopper.CANDIDATES
        if row.block == 128:
            assert fastest[row.op] == f"{row.op}, blocks of 128, {row.stages} stages"
    assert sorted((row.op, row.block) for row in rows) == [
        ("dkdv", 64), ("dkdv", 128), ("dq", 64), ("dq", 128), ("gradients", 128)
    ]  # fmt: skip


def test_blocks_of_64_are_faster_than_the_plain_kernels():
    cases = json.loads((RESULTS / "h200-backward-2.json").read_text())["cases"]
    kernels, operators = (
        next(x["ms"] for x in cases if x["case"] == f"{what} wan1.3b-480p keep 0.05 blocks 64x64")
        for what in ("kernels", "operators")
    )
    for op in ("dq", "dkdv"):
        assert (
            kernels[f"{op}, blocks of 64, {find(op, 90, 128, 64).stages} stages"]
            < (kernels[f"plain {op}"])
        )
    for name in ("backward", "pooled", "SLA"):
        assert operators[name] < operators[f"{name}, plain"]
    assert not find("dq", 90, 64, 64).specialized  # a training step gained nothing by it


@pytest.mark.parametrize("plain_row,served", [
    (None, True), (("dq", 64), False), (("dkdv", 128), False), (("dkdv", 64), True),
])  # fmt: skip
def test_both_of_its_blocks_decide(monkeypatch, plain_row, served):
    def find(op, _, __, block):
        return SimpleNamespace(specialized=(op, block) != plain_row)

    q, k, v, grad, table = inputs(64, 64, 64, 64, 128)
    monkeypatch.setattr(plain, "find", find)
    monkeypatch.setattr(plain, "capability_of", lambda _: 90)
    fake = SimpleNamespace(is_cuda=True, shape=q.shape)
    monkeypatch.setattr(hopper, "unserved", lambda *_: None)
    assert (plain.specialized(fake, k, v, grad, table, None) is hopper) == served


def test_what_it_declines():
    q, k, v, grad, table = inputs(64, 64, 64, 64, 64)
    assert hopper.unserved(q, k, v, grad, table, None) is None
    assert "16-bit" in hopper.unserved(q.float(), k, v, grad, table, None)
    assert "kv_len" in hopper.unserved(q, k, v, grad, table, torch.tensor([3]))
    assert "strides" in hopper.unserved(q, k, v, grad[..., :1].expand_as(q), table, None)
    assert plain.specialized(q, k, v, grad, table, None) is None  # no GPU


@pytest.mark.slow
def test_compiles_for_hopper():
    rows = compiled("backward+@90")
    assert len(rows) == 2 * len(hopper.CANDIDATES)
    for row in rows:
        # the sum for dq leaves no register for addresses: they are read anew in each pair
        assert row["stack"] <= (320 if row["op"] == "gradients" else 32), row
        assert row["shared"] <= 227 * 1024 and row["cp_async"] == 0, row
        assert row["tma"] > 5 and row["wgmma"] >= 24, row


@pytest.mark.gpu
@pytest.mark.parametrize("row", hopper.CANDIDATES, ids=lambda r: f"{r.op}{r.block}x{r.stages}")
@pytest.mark.parametrize("n", [63, 1000])
@pytest.mark.parametrize("d", [64, 128])
def test_on_a_gpu(row, n, d):
    args = inputs(n, n, d, row.block, row.block, torch.bfloat16, "cuda")
    q, k, v, grad, table = args
    if plain.capability_of(q) != 90:
        assert "9.0" in hopper.unserved(q, k, v, grad, table, None)
        return
    out, lse = reference.block_sparse_attention(q, k, v, table, None, True)
    x = hopper.prepare(grad, None, q, k, v, out, lse, table)
    grads = [torch.full_like(y, torch.nan) for y in (q, k, v)]
    total = hopper.total_of(x) if row.op == "gradients" else None
    if row.op == "dq":
        call = hopper.dq_launch(x, row, grads[0])
        hopper.run(hopper._block_sparse_attention_hopper_bwd_dq_kernel, *call)
    else:
        call = hopper.dkdv_launch(x, row, transpose_table(table), *grads[1:], total)
        hopper.run(hopper._block_sparse_attention_hopper_bwd_dkdv_kernel, *call)
    if total is not None:
        hopper.finish(x, total, grads[0])
    made = {"dq": (0,), "dkdv": (1, 2), "gradients": (0, 1, 2)}[row.op]
    wide, same = expected(*args)
    for i in made:
        assert_close(("dq", "dk", "dv")[i], grads[i], wide[i], same[i])
