"""What every selector promises, in every method."""

import pytest
import torch

import dit_accel
from dit_accel.methods import Call, find, selectors
from dit_accel.methods.topk import TopK

GRID = (5, 8, 8)
NAMES = [name for name in selectors.infos() if name != "per-head"]
TAKERS = ("topk", "pooled", "rectified", "shared", "sla")


def qkv(n=320, n_k=None):
    return [2 * torch.randn(1, 3, m, 16) for m in (n, n_k or n, n_k or n)]


@pytest.mark.parametrize("name", NAMES)
def test_all_blocks_are_dense_in_every_method(name):
    q, k, v = qkv()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for taker in TAKERS:
        out = find(taker)(1.0, select=name)(q, k, v, Call(1.0, grid=GRID))
        torch.testing.assert_close(out, dense, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [400, torch.tensor([390])], ids=["int", "tensor"])
def test_the_count_is_exact_text_is_read_and_padding_is_not(name, length):
    """Nine key blocks, of which the first holds text and the last two padding alone."""
    q, k, v = qkv(320, 530)
    k[:, :, 448:] = float("nan")
    forced = torch.zeros(9, dtype=torch.bool)
    forced[0] = True
    method = TopK(0.4, block_q=64, select=name)
    call = Call(0.4, grid=GRID, forced=forced, n_forced=1, kv_len=length, text_first=True)
    call.values = v
    table, _ = method.chosen(q, k, call, v)
    mask = table.to_mask()
    assert mask[..., 0].all() and not mask[..., 7:].any()
    if method.select.counted and name != "relative":  # a cap there
        assert (mask.sum(-1) == 4).all()
    else:
        assert (mask.sum(-1) >= 2).all()


@pytest.mark.parametrize("name", NAMES)
def test_heads_go_their_own_way(name):
    """Heads in another order, samples by themselves: the same tables."""
    q, k, v = (torch.cat(qkv()[:1] * 2) + 0.1 * torch.randn(2, 3, 320, 16) for _ in range(3))
    call = Call(0.4, grid=GRID, heads=(0, 1, 2))
    method = TopK(0.4, block_q=64, select=name)
    mask = method.chosen(q, k, call, v)[0].to_mask()
    turn = [2, 0, 1]
    other = Call(0.4, grid=GRID, heads=(2, 0, 1))
    turned = method.chosen(*(x[:, turn] for x in (q, k)), other, v[:, turn])[0].to_mask()
    assert torch.equal(turned, mask[:, turn])
    alone = method.chosen(q[1:], k[1:], call, v[1:])[0].to_mask()
    assert torch.equal(alone, mask[1:])


@pytest.mark.parametrize("name", NAMES)
def test_a_share_for_each_head(name):
    q, k, v = qkv()
    method = TopK(0.4, block_q=64, select=name)
    if not method.select.counted or name == "relative":
        return
    table, _ = method.chosen(q, k, Call((0.2, 0.6, 1.0), grid=GRID), v)
    assert table.counts[0].unique(dim=1).tolist() == [[1], [3], [5]]


@pytest.mark.parametrize("name", NAMES)
def test_rectified_reads_the_mass_and_the_neighbours_besides(name):
    q, k, v = qkv()
    method = find("rectified")(0.2, block_q=64, mass=0.5, neighbours=1, select=name)
    mask = method.choose(q, k, Call(0.2, grid=GRID), v)[0].to_mask()[0]
    assert mask.diagonal(0, 1, 2).all() and mask.diagonal(1, 1, 2).all()
    shares = torch.einsum("bhnd,bhmd->bhnm", *(x.unflatten(2, (5, 64)).mean(3) for x in (q, k)))
    held = ((shares / 4).softmax(-1)[0] * mask).sum(-1)
    assert (held > 0.5).all() or name == "sub"  # whose shares are others


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_runs_by_it_in_bfloat16(name):
    q, k, v = (x.bfloat16() for x in qkv())
    method = find("pooled")(0.3, select=name)
    assert dit_accel.AccelConfig.from_dict(dit_accel.AccelConfig(method).to_dict()).method == method
    out = method(q, k, v, Call(0.3, grid=GRID))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
