"""The plain torch table against the naive one, choice by choice."""

import pytest
import torch

from dit_accel.kernels.block_table import reference
from dit_accel.kernels.block_table import torch as fast

LENGTHS = [(1, 1), (63, 65), (64, 64), (65, 63), (1000, 1000), (130, 1000)]


def same(a, b) -> bool:
    return (
        torch.equal(a.to_mask(), b.to_mask())
        and torch.equal(a.counts, b.counts)
        and a.indices.shape == b.indices.shape
    )


@pytest.mark.parametrize("n_q,n_k", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("keep", [1e-3, 0.3, 0.5, 1.0])
def test_same_choice(n_q: int, n_k: int, dtype: torch.dtype, keep: float):
    q = torch.randn(2, n_q, 2, 40).to(dtype).transpose(1, 2)
    k = torch.randn(2, 2, n_k, 40).to(dtype)
    for block_q, block_k in ((64, 64), (128, 64), (64, 128)):
        tables = (x.block_table(q, k, keep, block_q, block_k) for x in (reference, fast))
        assert same(*tables)


@pytest.mark.parametrize(
    "kv_len", [1, 64, 100, 299, torch.tensor([300, 37]), torch.tensor([0, 64])]
)
@pytest.mark.parametrize("shape", [None, (5,), (3, 5), (1, 2, 1, 5), (2, 1, 3, 1)])
def test_forced_and_padding(kv_len: int | torch.Tensor, shape: tuple[int, ...] | None):
    q, k = torch.randn(2, 2, 130, 16), torch.randn(2, 2, 300, 16)
    ends = torch.as_tensor(kv_len).expand(2).tolist()
    for b, end in enumerate(ends):
        k[b, :, end:] = torch.nan
    forced = None if shape is None else torch.rand(shape) < 0.3
    a, b = (x.block_table(q, k, 0.25, forced=forced, kv_len=kv_len) for x in (reference, fast))
    assert same(a, b)
    for row, end in zip(a.to_mask(), ends, strict=True):
        assert not row[..., -(-end // 64) :].any()


@pytest.mark.parametrize("mass", [0.0, 0.3, 0.97])
@pytest.mark.parametrize("kv_len", [None, 100, torch.tensor([300, 37])])
@pytest.mark.parametrize("forced", [None, (5,), (2, 1, 3, 1)])
def test_mass_and_near(mass: float, kv_len: int | torch.Tensor | None, forced: tuple | None):
    q, k = 2 * torch.randn(2, 2, 130, 16), 2 * torch.randn(2, 2, 300, 16)
    forced = None if forced is None else torch.rand(forced) < 0.3
    near = torch.rand(3, 5) < 0.3
    options = {"forced": forced, "kv_len": kv_len, "mass": mass, "near": near, "max_near": 5}
    assert same(*(x.block_table(q, k, 0.25, **options) for x in (reference, fast)))


def test_forced_come_on_top_of_the_best():
    q, k = torch.randn(1, 1, 64, 16), torch.randn(1, 1, 640, 16)
    best = fast.block_table(q, k, 0.3).to_mask()
    forced = best.clone()
    forced[..., best[0, 0, 0].nonzero()[0]] = False
    table = fast.block_table(q, k, 0.3, forced=forced)
    assert table.counts.item() == 3 + 2
    assert (table.to_mask() >= best).all()


def test_short_block_counts_its_own_tokens():
    # One token of a short block scores 1; a mean over 64 would give 1/64 and lose to 0.5.
    q, k = torch.ones(1, 1, 64, 1), torch.full((1, 1, 65, 1), 0.5)
    k[0, 0, 64] = 1
    assert fast.block_table(q, k, 0.5).indices.item() == 1
