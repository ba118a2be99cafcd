"""The Triton block table, its means, its pool and its transpose against the naive ones."""

import pytest
import torch

from dit_accel.kernels.block_table import reference
from dit_accel.kernels.block_table import triton as kernel
from dit_accel.kernels.block_table.means import block_means, query_key_means
from dit_accel.kernels.block_table.pool import kept_bits, pooled_blocks
from dit_accel.kernels.block_table.transpose import kept_map, transpose_table
from dit_accel.table import BlockTable, block_count

HALF = torch.float16


def inputs(n_q, n_k, d, dtype, device="cpu", batch=1):
    return [torch.randn(batch, n, 2, d).to(device, dtype).transpose(1, 2) for n in (n_q, n_k)]


def assert_same(table: BlockTable, other: BlockTable) -> None:
    assert table.indices.shape == other.indices.shape
    assert torch.equal(table.counts, other.counts)
    assert torch.equal(table.indices[table.valid()], other.indices[other.valid()])
    assert (table.indices >= 0).all() and (table.indices < table.key_blocks).all()


@pytest.mark.parametrize("keep", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(
    "n_q,n_k,d,block_q,block_k,dtype",
    [
        (1, 1, 64, 64, 64, torch.float32),
        (65, 63, 80, 64, 64, HALF),
        (65, 250, 96, 64, 16, torch.float32),
        (130, 300, 128, 128, 32, HALF),
    ],
)
def test_best_blocks(n_q, n_k, d, block_q, block_k, dtype, keep, device):
    q, k = inputs(n_q, n_k, d, dtype, device)
    arguments = (q, k, keep, block_q, block_k)
    assert_same(kernel.block_table(*arguments), reference.block_table(*arguments))


@pytest.mark.parametrize("kv_len", [133, torch.tensor([200, 70]), torch.tensor([0, 64])])
@pytest.mark.parametrize("shape", [None, (2, 1, 2, 13)])
def test_forced_blocks_and_padding(kv_len, shape, device):
    q, k = inputs(65, 200, 64, HALF, device, batch=2)
    for b, end in enumerate(torch.as_tensor(kv_len).expand(2).tolist()):
        k[b, :, end:] = torch.nan
    if isinstance(kv_len, torch.Tensor):
        kv_len = kv_len.to(device)
    forced = None if shape is None else torch.rand(shape, device=device) < 0.2
    arguments = (q, k, 0.2, 64, 16, forced, kv_len, None if shape is None else 13)
    assert_same(kernel.block_table(*arguments), reference.block_table(*arguments))


@pytest.mark.parametrize("mass", [0.0, 0.3, 0.6, 0.97])
@pytest.mark.parametrize("keep", [0.01, 0.4])
@pytest.mark.parametrize("kv_len", [None, 85, torch.tensor([136, 45])])
def test_mass_and_near_blocks(mass, keep, kv_len, device):
    q, k = (2 * x for x in inputs(65, 136, 64, torch.float32, device, batch=2))
    if isinstance(kv_len, torch.Tensor):
        kv_len = kv_len.to(device)
    forced, near = torch.rand(9, device=device) < 0.2, torch.rand(2, 9, device=device) < 0.2
    arguments = (q, k, keep, 64, 16, forced, kv_len, 9, mass, near, 9, 0.2)
    assert_same(kernel.block_table(*arguments), reference.block_table(*arguments))


def test_scores_of_all_sizes_and_signs(device):
    q, k = inputs(65, 300, 64, torch.float32, device)
    sizes = 10 ** (20 * torch.rand(1, 2, 300, 1, device=device) - 10)
    for keys in (k * sizes, -k.abs() * sizes, torch.where(sizes > 1e9, k * sizes, 1e-30 * k)):
        arguments = (q, keys, 0.35, 64, 16)
        assert_same(kernel.block_table(*arguments), reference.block_table(*arguments))


def test_equal_shares_go_to_the_first_blocks(device):
    q, k = inputs(65, 320, 64, HALF, device)
    table = kernel.block_table(q, torch.ones_like(k), 0.1, 64, 32, mass=0.45)
    first = torch.arange(5, device=device)
    assert (table.counts == 5).all() and (table.indices[..., :5] == first).all()


def test_equal_scores_go_to_the_first_blocks(device):
    q, k = inputs(65, 300, 64, HALF, device)
    table = kernel.block_table(q, torch.ones_like(k), 0.5, 64, 32)
    assert (table.counts == 5).all() and (table.indices == torch.arange(5, device=device)).all()


@pytest.mark.parametrize("kv_len", [None, 133, torch.tensor([200, 70]), torch.tensor([0, 64])])
def test_the_means_it_returns(kv_len, device):
    q, k = inputs(65, 200, 80, HALF, device, batch=2)
    if isinstance(kv_len, torch.Tensor):
        kv_len = kv_len.to(device)
    options = {"kv_len": kv_len, "return_means": True}
    arguments = (q, k, 0.3, 64, 16)
    found, plain = (
        module.block_table(*arguments, **options, spreads=True)[1] for module in (kernel, reference)
    )
    for name in ("q", "k", "q_far", "k_far"):
        a, b = getattr(found, name), getattr(plain, name)
        assert a.dtype == b.dtype == (HALF if "far" in name else torch.float32)
        torch.testing.assert_close(a, b)
    assert kernel.block_table(*arguments, **options)[1].k_far is None


def test_heads_in_parts_are_equal(monkeypatch, device):
    q, k = inputs(65, 100, 64, HALF, device, batch=2)
    forced = torch.rand(2, 2, 1, 7, device=device) < 0.2
    whole = kernel.block_table(q, k, 0.3, 64, 16, forced, None, 7)
    monkeypatch.setattr(kernel, "_SCORE_BYTES", 1)
    assert_same(kernel.block_table(q, k, 0.3, 64, 16, forced, None, 7), whole)


def test_kept_map_and_transpose(device):
    mask = torch.rand(2, 2, 20, 19, device=device) < 0.3
    mask[0, 0, 3], mask[1, 1, :, 4] = False, False
    table = BlockTable.from_mask(mask, 64, 64, 20 * 64, 19 * 64)
    assert torch.equal(kept_map(table).bool(), mask)
    starts, counts, rows = transpose_table(table)
    for b, h, m in torch.cartesian_prod(*map(torch.arange, (2, 2, 19))).tolist():
        start = int(starts[b, h, m])
        found = rows[start : start + int(counts[b, h, m])]
        assert torch.equal(found.long(), mask[b, h, :, m].nonzero()[:, 0])


@pytest.mark.parametrize("blocks,kv_len", [(19, None), (40, 33 * 64 - 5), (130, 64), (2100, None)])
def test_kept_bits(blocks, kv_len, device):
    mask = torch.rand(1, 2, 3, blocks, device=device) < 0.3
    mask[0, 0, 0], mask[0, 1, 1] = False, True
    table = BlockTable.from_mask(mask, 64, 64, 3 * 64, blocks * 64)
    live = block_count(kv_len or blocks * 64, 64)
    bits = table.to_bits(live)
    assert bits.dtype == torch.int32 and bits.shape[-1] == 4 * block_count(blocks, 128)
    found = (bits[..., None] >> torch.arange(32, device=device) & 1).flatten(-2).bool()
    assert torch.equal(found[..., :live], mask[..., :live]) and found[..., live:].all()
    assert torch.equal(kept_bits(table, kv_len), bits)
    per_sample = torch.tensor([64], device=device)
    assert torch.equal(kept_bits(table, per_sample), table.to_bits())


@pytest.mark.parametrize("kv_len", [None, 133, torch.tensor([140, 70])], ids=str)
@pytest.mark.parametrize("blocks", [(64, 64), (64, 16), (64, 1)])
def test_the_bits_it_returns(blocks, kv_len, device):
    q, k = inputs(65, 140, 64, HALF, device, batch=2)
    if isinstance(kv_len, torch.Tensor):
        kv_len = kv_len.to(device)
    forced = torch.rand(block_count(140, blocks[1]), device=device) < 0.2
    options = {"kv_len": kv_len, "max_forced": len(forced), "return_means": True}
    table, _ = kernel.block_table(q, k, 0.3, *blocks, forced, **options)
    plain = BlockTable(table.indices, table.counts, *blocks, 65, 140)
    assert table.bits.kv_len is kv_len and plain.bits is None
    assert torch.equal(table.bits.words, kept_bits(plain, kv_len))


@pytest.mark.parametrize("kv_len", [None, 70, torch.tensor([70])], ids=str)
@pytest.mark.parametrize("d", [64, 80, 128])
def test_the_pool_of_keys_and_values(d, kv_len, device):
    k, v = inputs(150, 150, d, HALF, device)
    limit = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    means, far = block_means(k, 32, limit, spread=True)
    for known in (None, means):
        pool = pooled_blocks(k, v, 32, limit, known, rest=True, spread=True, multiple=8)
        assert pool.k.shape == pool.v.shape == pool.k_rest.shape == (1, 2, 8, d)
        assert torch.equal(pool.k[:, :, :5], means.half())
        assert torch.equal(pool.k_rest[:, :, :5], (means - means.half()).half())
        assert torch.equal(pool.v[:, :, :5], block_means(v, 32, limit)[0].half())
        assert not any(x[:, :, 5:].any() for x in pool[:2])
        assert (pool.k_far is None) == (known is not None)
    assert torch.equal(pooled_blocks(k, v, 32, limit, spread=True).k_far, far)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_means_and_deviations(dtype, device):
    x = inputs(100, 1, 80, dtype, device)[0]
    mean, far = block_means(x, 32, 70, spread=True)
    assert mean.shape == (1, 2, 4, 80) and not mean[:, :, block_count(70, 32) :].any()
    for m, block in enumerate(x[:, :, :70].float().split(32, 2)):
        torch.testing.assert_close(mean[:, :, m], block.mean(2))
        expected = (block - block.mean(2, keepdim=True)).abs().mean(2)
        torch.testing.assert_close(far[:, :, m], expected.to(dtype))


@pytest.mark.parametrize("kv_len", [None, 70, torch.tensor([70])], ids=str)
def test_means_of_queries_and_keys_together_are_those_apart(kv_len, device):
    q, k = inputs(65, 100, 64, HALF, device)
    limit = kv_len.to(device) if isinstance(kv_len, torch.Tensor) else kv_len
    for spread in (False, True):
        found = [x[:2] for x in query_key_means(q, k, 64, 32, limit, spread)]
        apart = block_means(q, 64, None, spread), block_means(k, 32, limit, spread)
        for a, b in zip(sum(found, ()), sum(apart, ()), strict=True):
            assert (a is None) == (b is None) == (not spread and a is None)
            assert a is None or torch.equal(a, b)
