"""The static controls, by what they promise of layers and heads."""

import pytest
import torch

from dit_accel.methods import Call
from dit_accel.methods.topk import TopK


def mask(select, keep, heads=1):
    """[H, Mq, Mk]: 32 blocks of 64."""
    q = torch.randn(1, heads, 2048, 8)
    table = TopK(keep, block_q=64, select=select).table(q, q, Call(keep))
    return table.to_mask()[0]


def reached(pattern, layers):
    """Which blocks any way of so many layers leads to."""
    return torch.linalg.matrix_power(pattern.double(), layers) > 0


def test_powers_of_two_reach_everything_in_log_layers():
    found = mask("power", 11 / 32)[0]
    far = (torch.arange(32)[:, None] - torch.arange(32)).abs()
    powers = (far[:, :, None] == torch.tensor([0, 1, 2, 4, 8, 16])).any(-1)
    assert (found & powers).sum() == powers.sum() and (found.sum(1) == 11).all()
    assert reached(found, 5).all() and not reached(powers, 1).all()
    few = mask("power", 4 / 32)[0]
    assert few[16].nonzero()[:, 0].tolist() == [14, 15, 16, 17]  # the nearest first


def test_the_shards_of_all_heads_are_everything():
    found = mask("shards", 5 / 32, heads=8)
    assert (found.sum(-1) == 5).all() and found.any(0).all() and not found[:7].any(0).all()
    assert found[3, 0].nonzero()[:, 0].tolist() == [0, 5, 13, 21, 29]
    q = torch.randn(1, 2, 2048, 8)
    some = TopK(5 / 32, block_q=64, select="shards").table(q, q, Call(5 / 32, heads=(6, 7)))
    assert torch.equal(some.to_mask()[0], found[6:])


def test_a_keep_for_each_head_is_its_own_stride():
    q = torch.randn(1, 2, 2048, 8)
    table = TopK(0.2, block_q=64, select="shards(3)").table(q, q, Call((5 / 32, 11 / 32)))
    assert (table.counts[0, 0] == 5).all() and (table.counts[0, 1] == 11).all()
    rows = table.to_mask()[0]
    assert torch.equal(rows[1], mask("shards(3)", 11 / 32, heads=2)[1])
    assert torch.equal(rows[0], mask("shards(3)", 5 / 32, heads=2)[0])


def test_a_window_and_a_grid_reach_everything_in_two_layers():
    found = mask("axes", 12 / 32)[0]
    assert (found.sum(1) == 12).all() and not found.all() and reached(found, 2).all()
    assert found[7, 6:12].all() and found[7, [2, 12, 17, 22, 27]].all()


@pytest.mark.parametrize("select", ["power", "shards", "axes"])
def test_distance_begins_behind_the_text_and_a_part_has_its_own_rows(select):
    q, k = torch.randn(1, 2, 640, 8), torch.randn(1, 2, 704, 8)
    text = torch.zeros(11, dtype=torch.bool)
    text[0] = True
    call = Call(0.3, forced=text, n_forced=1, text_first=True)
    method = TopK(0.3, block_q=64, select=select)
    whole = method.table(q, k, call).to_mask()
    assert whole[..., 0].all() and whole[0, 0].diagonal(1).all()
    part = Call(0.3, forced=text, n_forced=1, text_first=True, first=256, queries=640)
    rows = method.table(q[:, :, 256:512], k, part).to_mask()
    assert torch.equal(rows, whole[:, :, 4:8])
