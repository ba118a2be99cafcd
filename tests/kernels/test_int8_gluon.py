"""The Hopper kernel in eight bits: emulated with its roles in random order, compiled, on a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compiling import compiled, count, listing, loops
from gluon_emulator import emulated
from gluon_machine import Deadlock

from dit_accel.kernels.block_sparse_attention import reference as exact
from dit_accel.kernels.int8_attention import gluon, quantize, reference
from dit_accel.kernels.int8_attention import triton as plain
from dit_accel.table import BlockTable, block_count
from dit_accel.testing import WIDER, assert_close

pytestmark = pytest.mark.usefixtures("right_e4m3")
KERNEL = "_int8_attention_hopper_fwd_kernel"
TEXT = Path(gluon.__file__).with_name("gluon_kernel.py")
EMULATED = emulated(TEXT, KERNEL)
HALF = torch.float16
CASES = [
    # n_q, n_k, d, block_k, keep, kv_len, stages, programs
    (1, 1, 64, 64, 2, None, 2, 1),
    (200, 300, 64, 64, 0.5, None, 2, 1),
    (300, 700, 128, 128, 0.5, None, 3, 2),
    (300, 700, 128, 64, 0.3, None, 4, 1),
    (260, 500, 64, 64, 2, 130, 2, 2),
    (260, 500, 64, 128, 0.0, None, 2, 2),
    (300, 440, 128, 128, 0.6, 400, 2, 1),
]
# Each breaks the protocol in one place.
ERRORS = [
    ("mbarrier.arrive(empty.index(st), count=1)", "pass"),
    ("mbarrier.arrive(q_empty, count=1)", "pass"),
    ("mbarrier.arrive(bar, count=1)", "pass"),
    ("mbarrier.init(full.index(i), count=2)", "mbarrier.init(full.index(i), count=1)"),
    ("mbarrier.init(empty.index(i), count=2)", "mbarrier.init(empty.index(i), count=1)"),
    ("mbarrier.init(q_empty, count=2)", "mbarrier.init(q_empty, count=1)"),
    ("mbarrier.wait(empty.index(st), (g // STAGES & 1) ^ 1)", "pass"),
    ("mbarrier.wait(q_empty, phase ^ 1)", "pass"),
    ("mbarrier.wait(q_full, phase)", "pass"),
    ("            mbarrier.wait(full.index(g % STAGES), g // STAGES & 1)\n", ""),
    ("mbarrier.expect(bar, 4 * 64 * D)", "mbarrier.expect(bar, 64 * D)"),
    ("warpgroup_mma_wait(0, (b_s0, b_s1, b_o))", "warpgroup_mma_wait(1, (b_s0, b_s1, b_o))"),
    ("e_0, e_1 = gl.load(p_exponent + at_0)", "e_0, e_1 = -gl.load(p_exponent + at_0)"),
]


def emulate(case, q, k, v, table, seed=0, run=EMULATED):
    """Output and LSE of the emulated kernel."""
    _, _, d, block_k, _, kv_len, stages, programs = case
    row = replace(gluon.CANDIDATES[0], stages=stages)
    keys = quantize.quantize(k, v, block_k, 64, kv_len)
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:3], torch.nan)
    assert gluon.unserved(q, out, table, row, kv_len) is None
    grid, arguments, _ = gluon.forward(q, keys, out, lse, table, row, None, kv_len)
    run(arguments, min(programs, *grid), seed)
    return out, lse


def check(outs, q, k, v, table, kv_len):
    options = {"return_lse": True, "kv_len": kv_len}
    wide = exact.block_sparse_attention(q, k, v, table, dtype=WIDER[q.dtype], **options)
    same = reference.int8_attention(q, k, v, table, **options)
    assert_close("out", outs[0], wide[0], same[0])
    assert_close("lse", outs[1], wide[1], same[1])
    torch.testing.assert_close(outs[1], same[1], atol=2e-2, rtol=1e-4)


def inputs(n_q, n_k, d, block_k, keep=0.5, dtype=HALF, device="cpu", block_q=128):
    """Keys that have a mean, as real ones do, and a table whose first row has no block."""
    q, k, v = (torch.randn(1, n, 2, d).to(device, dtype).transpose(1, 2) for n in (n_q, n_k, n_k))
    mask = torch.rand(1, 2, block_count(n_q, block_q), block_count(n_k, block_k)) < keep
    mask[0, 0, 0] = False
    k = k + 3 * torch.randn(1, 2, 1, d).to(device, dtype)
    return q, k, v, BlockTable.from_mask(mask.to(device), block_q, block_k, n_q, n_k)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_the_roles_gives_the_attention(case, seed):
    q, k, v, table = inputs(*case[:5])
    if case[5] is not None:
        k[:, :, case[5] :], v[:, :, case[5] :] = torch.nan, torch.nan
    check(emulate(case, q, k, v, table, 100 * seed), q, k, v, table, case[5])


@pytest.mark.parametrize("change", ERRORS, ids=lambda pair: pair[0].strip()[:40])
def test_an_error_in_the_protocol_is_noticed(change):
    broken = emulated(TEXT, KERNEL, change)
    case = (300, 500, 64, 64, 0.6, None, 2, 1)
    args = inputs(*case[:5])
    args[2][:, :, 100:300] *= 20  # groups of values with other exponents
    noticed = False
    for seed in range(12):
        try:
            check(emulate(case, *args, seed=seed, run=broken), *args, None)
        except (AssertionError, Deadlock):
            noticed = True
            break
    assert noticed


def test_what_it_declines():
    q, k, v, table = inputs(64, 64, 64, 64)
    row = gluon.CANDIDATES[0]
    assert gluon.unserved(q, q, table, row) is None
    assert "128 queries" in gluon.unserved(q, q, inputs(64, 64, 64, 64, block_q=64)[3], row)
    long = inputs(300, 16500, 64, 64, keep=2)[3]
    assert "16384 keys" in gluon.unserved(q, q, long, row)
    assert "kv_len" in gluon.unserved(q, q, table, row, torch.tensor([3]))
    assert "16-bit" in gluon.unserved(q.float(), q.float(), table, row)


def test_compiles_for_hopper():
    rows = compiled("int8+@90")
    assert len(rows) == 2 * len(gluon.CANDIDATES)
    for row in rows:
        assert row["shared"] <= 227 * 1024 and row["tma"] > 5 and row["wgmma"] >= 24, row


def test_the_loop_over_tiles_holds_nothing_that_is_not_its_own():
    _, code = listing(gluon.__name__)
    found = [body for body in loops(code) if count("[IQ]GMMA", body) == 12]
    assert len(found) == 2  # of each warpgroup
    for body in found:
        assert not count("LDL", body) + count("STL", body)  # nothing waits in memory
        assert count("WARPGROUP.DEPBAR", body) == 1  # products run side by side
        assert count("PRMT", body) <= 20  # weights are never taken apart


@pytest.mark.gpu
@pytest.mark.parametrize("row", gluon.CANDIDATES, ids=lambda r: f"{r.stages} stages")
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 4100])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("block_k", [64, 128])
def test_on_a_gpu(row, n, d, block_k):
    q, k, v, table = inputs(n, n, d, block_k, 0.5, torch.bfloat16, "cuda")
    keys, out = quantize.quantize(k, v, block_k, 64), torch.full_like(q, torch.nan)
    lse = q.new_full(q.shape[:3], torch.nan).float()
    reason = gluon.unserved(q, out, table, row)
    if plain.capability_of(out) != 90:
        assert "9.0" in reason
        return
    gluon.attend(q, keys, out, lse, table, row)
    check((out, lse), q, k, v, table, None)
