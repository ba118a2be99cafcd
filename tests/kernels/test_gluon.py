"""The Hopper kernel: emulated with its roles in random order, and on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from gluon_emulator import emulated
from gluon_machine import Deadlock

from dit_accel import ops
from dit_accel.kernels.block_sparse_attention import gluon, reference
from dit_accel.kernels.block_sparse_attention import triton as plain
from dit_accel.kernels.block_table.pool import kept_bits
from dit_accel.kernels.launch import find
from dit_accel.kernels.pooled_attention import reference as pooled_reference
from dit_accel.kernels.sparse_linear_attention import reference as linear_reference
from dit_accel.kernels.sparse_linear_attention.features import EPS, FEATURE_MAPS, features
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import assert_close, references

KERNEL = "_block_sparse_attention_hopper_fwd_kernel"
TEXT = Path(gluon.__file__).with_name("gluon_kernel.py")
EMULATED = emulated(TEXT, KERNEL)
HALF = torch.float16
CASES = [
    # n_q, n_k, d, block_q, block_k, tile, stages, programs
    (1, 1, 64, 128, 64, 64, 2, 1),
    (200, 300, 64, 128, 64, 64, 3, 1),
    (200, 300, 64, 64, 64, 64, 2, 3),
    (300, 700, 128, 128, 128, 64, 4, 2),
    (300, 700, 64, 128, 128, 128, 2, 2),
    (129, 330, 64, 64, 128, 64, 2, 2),
]
# Query blocks, and whether key blocks go in pairs: of 128 two warpgroups a row, of 64 two lanes.
FORMS = [(128, False), (128, True), (64, False)]
# Each breaks the protocol in one place.
ERRORS = [
    ("mbarrier.arrive(empty.index(st), count=1)", "pass"),
    ("mbarrier.arrive(q_empty, count=1)", "pass"),
    ("mbarrier.init(empty.index(i), count=PARTS)", "mbarrier.init(empty.index(i), count=1)"),
    ("mbarrier.init(q_empty, count=PARTS)", "mbarrier.init(q_empty, count=1)"),
    ("mbarrier.wait(empty.index(st), (g // STAGES & 1) ^ 1)", "pass"),
    ("mbarrier.wait(q_empty, phase ^ 1)", "pass"),
    ("mbarrier.wait(q_full, phase)", "pass"),
    ("(g + 1) // STAGES & 1, pred=more", "g // STAGES & 1, pred=more"),
    ("(g + 1) // STAGES & 1, pred=more", "(g + 1) // STAGES & 1"),
    ("            mbarrier.arrive(q_full, count=1)\n", ""),
    ("count=2 if COUNTED else 1", "count=1"),
    ("gl.where(o_t == 0, b_taken, 0)", "b_taken"),
    ("mbarrier.expect(bar, 4 * TILE * D)", "mbarrier.expect(bar, TILE * D)"),
    ("b_s = warpgroup_mma_wait(1,", "b_s = warpgroup_mma_wait(2,"),
    ("warpgroup_mma_wait(0, (o_token,))", "warpgroup_mma_wait(1, (o_token,))"),
    ("        tma.store_wait(0)\n        o_s", "        o_s"),
]


@pytest.fixture(autouse=True)
def rows_from_a_counter_however_few(monkeypatch):
    monkeypatch.setattr(gluon, "COUNTED", 0)


def inputs(n_q, n_k, d, block_q, block_k, dtype=HALF, device="cpu", keep=0.5):
    q, k, v = (torch.randn(1, n, 2, d).to(device, dtype).transpose(1, 2) for n in (n_q, n_k, n_k))
    mask = torch.rand(1, 2, block_count(n_q, block_q), block_count(n_k, block_k)) < keep
    mask[0, 0, 0] = False
    return q, k, v, BlockTable.from_mask(mask.to(device), block_q, block_k, n_q, n_k)


def launch_of(case, pairs=False, counter=False):
    """A launch for a case; with pairs, where 128 queries allow them, groups of 64 keys in twos."""
    *_, block_q, _, tile, stages, _ = case
    tile, pairs = (128, True) if pairs and block_q == 128 else (tile, False)
    return replace(
        gluon.CANDIDATES[0], block=block_q, tile=tile, stages=stages, pairs=pairs, counter=counter
    )


def emulate(case, q, k, v, table, seed=0, run=EMULATED, pairs=False, counter=None, **options):
    """Output and LSE of the emulated kernel; rows from a counter with odd seeds, or as told."""
    counter, programs = seed % 2 == 1 if counter is None else counter, case[-1]
    row = launch_of(case, pairs, counter)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    assert gluon.unserved(q, k, v, out, lse, table, row, **options) is None
    grid, arguments, _ = gluon.forward(q, k, v, out, lse, table, row, **options)
    run(arguments, min(programs, *grid), seed)
    return out, lse


def check(outs, ref, *args, **options):
    wide, same = references(ref, *args, **options)
    for name, *tensors in zip(("out", "lse"), outs, wide, same, strict=False):
        assert_close(name, *(x.float() if name == "lse" else x for x in tensors))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pairs", [False, True])
def test_any_order_of_the_roles_gives_the_attention(case, seed, pairs):
    args = inputs(*case[:5])
    outs = emulate(case, *args, seed=101 * seed, pairs=pairs)
    check(outs, reference.block_sparse_attention, *args, None, True)
    assert not outs[0][0, 0, : case[3]].any() and (outs[1][0, 0, : case[3]] == -torch.inf).all()


@pytest.mark.parametrize("programs", [1, 2])
def test_a_lane_may_have_no_row(programs):
    case = (150, 200, 128, 64, 64, 64, 3, programs)
    q, k, v, table = inputs(*case[:5])
    one = replace(table, indices=table.indices[:, :1], counts=table.counts[:, :1])
    for seed in range(4):
        args = (q[:, :1], k[:, :1], v[:, :1], one)
        outs = emulate(case, *args, seed=seed)
        check(outs, reference.block_sparse_attention, *args, None, True)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.4, 2.0])
@pytest.mark.parametrize("block_q,pairs", FORMS)
def test_rows_of_no_block_of_few_and_of_all(keep, block_q, pairs):
    case = (260, 500, 64, block_q, 64, 64, 2, 2)
    args = inputs(*case[:5], keep=keep)
    for seed in range(2):
        outs = emulate(case, *args, seed=seed, pairs=pairs)
        check(outs, reference.block_sparse_attention, *args, None, True)


@pytest.mark.parametrize("kv_len", [1, 64, 130, 999])
@pytest.mark.parametrize("block_q,pairs", FORMS)
def test_keys_beyond_kv_len_are_not_read(kv_len, block_q, pairs):
    case = (200, 300, 64, block_q, 64, 64, 2, 1)
    q, k, v, table = inputs(*case[:5])
    k[:, :, kv_len:], v[:, :, kv_len:] = torch.nan, torch.nan
    for seed in range(2):
        outs = emulate(case, q, k, v, table, seed=seed, kv_len=kv_len, pairs=pairs)
        check(outs, reference.block_sparse_attention, q, k, v, table, None, True, min(kv_len, 300))


def means(x, block, n_valid):
    """Mean rows of the blocks of [1, H, N, D], of their valid tokens, and zeros to a multiple of
    128."""
    parts = [part.float().mean(2) for part in x[:, :, :n_valid].split(block, 2)]
    return F.pad(torch.stack(parts, 2), (0, 0, 0, -len(parts) % 128)).to(x.dtype)


@pytest.mark.parametrize("kv_len", [None, 200])
@pytest.mark.parametrize("block_q,pairs", FORMS)
def test_pooled_keys_follow_the_kept_ones(kv_len, block_q, pairs):
    case = (150, 300, 64, block_q, 64, 64, 2, 2)
    q, k, v, table = inputs(*case[:5])
    pool = (*(means(x, 64, kv_len or 300) for x in (k, v)), kept_bits(table, kv_len))
    for seed in range(2):
        options = {"seed": seed, "kv_len": kv_len, "pool": pool, "pairs": pairs}
        outs = emulate(case, q, k, v, table, **options)
        check(outs, pooled_reference.pooled_attention, q, k, v, table, None, kv_len, True)


@pytest.mark.parametrize("block_q,pairs", FORMS)
def test_the_epilogue_rectifies(block_q, pairs):
    case = (150, 300, 64, block_q, 64, 64, 2, 1)
    q, k, v, table = inputs(*case[:5])
    ratio, shift = torch.rand(1, 2, 150 // block_q + 1), torch.randn(1, 2, 150 // block_q + 1, 64)
    expected = [
        x * ratio.repeat_interleave(block_q, 2)[:, :, :150, None].to(x.dtype)
        + shift.repeat_interleave(block_q, 2)[:, :, :150].to(x.dtype)
        for x in references(reference.block_sparse_attention, q, k, v, table)
    ]
    for seed in range(2):
        out, _ = emulate(case, q, k, v, table, seed=seed, rectify=(ratio, shift), pairs=pairs)
        assert_close("out", out, *expected)


@pytest.mark.parametrize("seed", range(4))
def test_the_row_of_64_queries_in_the_launch_table(seed, monkeypatch):
    row = find("forward", 90, 128, 64)
    assert row.specialized and row.block == 64
    assert not find("forward", 90, 64, 64).specialized  # no faster with heads of 64
    q, k, v, table = inputs(330, 450, 128, 64, 64)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    monkeypatch.setattr(gluon, "multiprocessors", lambda _: 2)
    grid, arguments, _ = gluon.forward(q, k, v, out, lse, table, row)
    assert arguments["taken"] is not None and arguments["STAGES"] == row.stages
    EMULATED(arguments, *grid, seed)
    check((out, lse), reference.block_sparse_attention, q, k, v, table, None, True)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("keep,uneven", [(0.4, False), ((0.2, 0.6), True)])
@pytest.mark.parametrize("block_q", [64, 128])
def test_even_rows_of_one_lane_and_heads_of_128_are_dealt_out(d, keep, uneven, block_q):
    case = (300, 500, d, block_q, 64, 64, 2, 2)
    q, k, v, _ = inputs(*case[:5])
    table, row = ops.block_table(q, k, keep, block_q, 64), launch_of(case, True, counter=True)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3])
    grid, arguments, _ = gluon.forward(q, k, v, out, lse, table, row)
    assert (arguments["taken"] is not None) == (uneven or block_q == 64 or d == 64)
    EMULATED(arguments, min(2, *grid), 1)
    check((out, lse), reference.block_sparse_attention, q, k, v, table, None, True)


def test_a_counter_is_for_lanes_of_many_rows(monkeypatch):
    monkeypatch.undo()
    for block, lanes in ((128, 1), (64, 2)):
        many = gluon.COUNTED * lanes * gluon.multiprocessors(torch.device("cpu"))
        row = find("forward", 90, 128, block)
        for rows, counted in ((many - 2, False), (many, True)):
            x = torch.empty(1, 2, 1, 128, dtype=HALF).expand(-1, -1, rows // 2 * block, -1)
            indices = torch.zeros(1, 2, rows // 2, 1, dtype=torch.int32)
            sizes = (block, 128, x.shape[2], x.shape[2])
            table = BlockTable(indices, indices[..., 0], *sizes, uneven=True)
            for launch, expected in ((row, counted), (replace(row, counter=False), False)):
                arguments = gluon.forward(x, x, x, x, None, table, launch)[1]
                assert (arguments["taken"] is not None) == expected


LINEAR = [
    # n_q, n_k, d, block_q, block_k, tile, stages, programs
    (150, 300, 64, 128, 64, 64, 2, 2),
    (200, 300, 128, 64, 128, 64, 2, 3),
    (300, 200, 128, 128, 128, 128, 2, 1),
]


def add_linear(case, q, k, v, table, kv_len, feature_map, weight, bias, **options):
    """Output of the emulated kernel with the linear branch over all keys."""
    n = min(k.shape[2], kv_len or k.shape[2])
    fk = features(k[:, :, :n].float(), feature_map)
    state = (fk.mT @ v[:, :, :n].float() @ weight.mT / n).to(q.dtype)
    linear = gluon.Linear(state, fk.sum(2) / n, bias, EPS / n, feature_map)
    row = launch_of(case, options.pop("pairs", False), options.get("seed", 0) % 2 == 1)
    out = torch.empty_like(q)
    call = (q, k, v, out, None, table, row, None, kv_len, None, None, linear)
    assert gluon.unserved(*call) is None
    grid, arguments, _ = gluon.forward(*call)
    options.pop("run", EMULATED)(arguments, min(case[7], *grid), options.get("seed", 0))
    return out


def check_linear(out, *args):
    assert_close("out", out, *references(linear_reference.sparse_linear_attention, *args))


@pytest.mark.parametrize("kv_len", [None, 130])
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_a_row_ends_with_the_linear_branch(case, feature_map, kv_len):
    d = case[2]
    for seed, dtype in enumerate((HALF, torch.bfloat16)):
        q, k, v, table = inputs(*case[:5], dtype)
        weight, bias = torch.randn(d, d) / d**0.5, torch.randn(d)
        if feature_map == "relu":
            # no key has the features of these queries
            q[:, :, :70] = -1.0
        k[:, :, kv_len or k.shape[2] :], v[:, :, kv_len or k.shape[2] :] = torch.nan, torch.nan
        for pairs in (False, True):
            options = {"seed": seed, "pairs": pairs}
            out = add_linear(case, q, k, v, table, kv_len, feature_map, weight, bias, **options)
            check_linear(out, q, k, v, table, weight, bias, feature_map, None, None, kv_len)


def test_the_linear_branch_without_a_bias_of_rows_with_and_without_blocks():
    for keep in (0.0, 2.0):
        case = (260, 500, 128, 128, 64, 64, 2, 2)
        q, k, v, table = inputs(*case[:5], keep=keep)
        weight = torch.randn(128, 128) / 128**0.5
        for seed in range(4):
            options = {"seed": seed, "pairs": bool(seed % 2)}
            out = add_linear(case, q, k, v, table, None, "softmax", weight, None, **options)
            check_linear(out, q, k, v, table, weight)


@pytest.mark.parametrize(
    "change",
    [
        ("i_0 += D - TILE", "pass"),
        ("(g + 1) // STAGES & 1)\n    b_o = warp", "g // STAGES & 1)\n    b_o = warp"),
        ("wait(0, (o_token,))\n    b_o = b_o *", "wait(1, (o_token,))\n    b_o = b_o *"),
        ("wait(0, (o_token,))\n    mb", "wait(1, (o_token,))\n    mb"),
        ("mbarrier.arrive(empty.index(st), count=1)\n    return gl", "return gl"),
    ],
    ids=lambda pair: pair[0][:30],
)
def test_an_error_in_the_linear_end_of_a_row_is_noticed(change):
    broken = emulated(TEXT, KERNEL, change)
    case = (300, 300, 128, 128, 64, 64, 2, 1)
    q, k, v, table = inputs(*case[:5])
    weight = torch.randn(128, 128) / 128**0.5
    noticed = False
    for seed in range(12):
        try:
            options = {"seed": seed, "run": broken}
            out = add_linear(case, q, k, v, table, None, "softmax", weight, None, **options)
            check_linear(out, q, k, v, table, weight)
        except (AssertionError, Deadlock):
            noticed = True
            break
    assert noticed


@pytest.mark.parametrize("change", ERRORS, ids=lambda pair: pair[0][:40] + " > " + pair[1][:20])
def test_an_error_in_the_protocol_is_noticed(change):
    broken = emulated(TEXT, KERNEL, change)
    case = (300, 400, 64, 128, 64, 64, 2, 1)
    args = inputs(*case[:5])
    noticed = False
    for seed in range(12):
        try:
            outs = emulate(case, *args, seed=seed, run=broken, pairs=seed % 4 > 1)
            check(outs, reference.block_sparse_attention, *args, None, True)
        except (AssertionError, Deadlock):
            noticed = True
            break
    assert noticed


def test_what_it_declines():
    q, k, v, table = inputs(64, 64, 64, 64, 64)
    row = gluon.CANDIDATES[-1]

    def reason(*tensors, of=table, **options):
        return gluon.unserved(*tensors, tensors[0], None, of, row, **options)

    assert reason(q, k, v) is None
    assert "16-bit" in reason(q.float(), k, v)
    assert "blocks" in reason(q, k, v, of=replace(table, block_k=32, n_k=32))
    assert "kv_len" in reason(q, k, v, kv_len=torch.tensor([3]))
    assert "kv_len" in reason(q, k, v, kv_len=0)
    assert "strides" in reason(q, k.mT.contiguous().mT, v)
    assert "strides" in reason(q, k, v.expand(2, -1, -1, -1)[:, :, :, ::2])


def test_a_declined_call_takes_the_plain_kernel(device):
    q, k, v, table = inputs(70, 200, 64, 64, 64, device=device)
    kv_len = torch.tensor([130], device=device)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], device=device)
    plain.attend(q, k, v, out, lse, table, gluon.CANDIDATES[-1], None, kv_len)
    check((out, lse), reference.block_sparse_attention, q, k, v, table, None, True, kv_len)


@pytest.mark.gpu
@pytest.mark.parametrize("row", gluon.CANDIDATES, ids=lambda r: f"{r.block}x{r.tile}x{r.stages}")
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 4100])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
def test_on_a_gpu(row, n, d, block_k):
    args = inputs(n, n, d, row.block, block_k, torch.bfloat16, "cuda")
    out, lse = torch.empty_like(args[0]), torch.empty(args[0].shape[:3], device="cuda")
    reason = gluon.unserved(*args[:3], out, lse, args[3], row)
    if plain.capability_of(out) != 90:
        assert "9.0" in reason
        return
    gluon.attend(*args[:3], out, lse, args[3], row)
    check((out, lse), reference.block_sparse_attention, *args, None, True)
