"""The block table and its two forms."""

import pytest
import torch

from dit_accel.table import BlockBits, BlockTable, kept_blocks, table_width


def random_mask(*shape: int) -> torch.Tensor:
    return torch.rand(*shape) < 0.4


@pytest.mark.parametrize("n_q,n_k", [(1, 1), (64, 65), (1000, 63), (130, 1000)])
def test_mask_round_trip(n_q: int, n_k: int):
    mask = random_mask(2, 3, -(-n_q // 64), -(-n_k // 64))
    table = BlockTable.from_mask(mask, 64, 64, n_q, n_k)
    assert torch.equal(table.to_mask(), mask)
    assert torch.equal(table.counts, mask.sum(-1).int())
    assert table.density() == mask.float().mean()


def test_rows_ascend_and_padding_is_safe_to_load():
    table = BlockTable.from_mask(random_mask(1, 2, 5, 9), 64, 64, 320, 576)
    steps = table.indices.diff(dim=-1)[table.valid()[..., 1:]]
    assert (steps > 0).all()
    assert ((table.indices >= 0) & (table.indices < 9)).all()


def test_empty_and_full_rows():
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    mask[0, 0, 1] = True
    table = BlockTable.from_mask(mask, 64, 64, 128, 130)
    assert table.counts.tolist() == [[[0, 3]]]
    assert torch.equal(table.to_mask(), mask)
    empty = BlockTable.from_mask(torch.zeros_like(mask), 64, 64, 128, 130)
    assert empty.indices.shape[-1] == 1 and not empty.to_mask().any()


@pytest.mark.parametrize(
    "keep,blocks,kept",
    [(0.2, 35, 7), (0.1, 10, 1), (0.001, 8, 1), (0.11, 100, 11), (0.101, 10, 2), (1.0, 7, 7)],
)
def test_kept_blocks(keep: float, blocks: int, kept: int):
    assert kept_blocks(keep, blocks) == kept
    assert table_width(keep, blocks, 0) == kept
    assert table_width(keep, blocks, None) == blocks


def test_a_union_keeps_the_pairs_of_either():
    masks = [torch.rand(2, 3, 5, 9) < keep for keep in (0.3, 0.5)]
    masks[0][0], masks[1][0, 0], masks[1][1, 0] = False, False, True
    tables = [BlockTable.from_mask(mask, 64, 32, 300, 270) for mask in masks]
    union = tables[0].union(tables[1])
    assert torch.equal(union.to_mask(), masks[0] | masks[1])
    assert (union.indices.diff() >= 0).all() and union.indices.max() < 9
    assert torch.equal(union.counts, (masks[0] | masks[1]).sum(-1).int())


def test_parts_and_unions_of_an_uneven_table_are_uneven():
    even = BlockTable(torch.arange(5).int().expand(1, 1, 4, 5), torch.full((1, 1, 4), 5).int(),
                      64, 64, 256, 320)  # fmt: skip
    uneven = BlockTable.from_mask(even.to_mask(), 64, 64, 256, 320)
    assert uneven.uneven and uneven.rows(64, 128).uneven
    assert even.union(uneven).uneven and uneven.union(even).uneven
    assert not (even.uneven or even.union(even).uneven or even.rows(64, 128).uneven)
    assert even.columns(64, 128).uneven  # a row may have all its blocks elsewhere


def test_bad_tables_say_why():
    indices, counts = torch.zeros(1, 1, 2, 1).int(), torch.ones(1, 1, 2).int()
    with pytest.raises(TypeError, match="int32"):
        BlockTable(indices.long(), counts, 64, 64, 128, 64)
    with pytest.raises(ValueError, match="needs? 3 rows"):
        BlockTable(indices, counts, 64, 64, 129, 64)
    with pytest.raises(ValueError, match=r"\[B, H, Mq, K\]"):
        BlockTable(indices, counts[0], 64, 64, 128, 64)
    with pytest.raises(ValueError, match="positive"):
        BlockTable(indices, counts, 64, 0, 128, 64)
    with pytest.raises(ValueError, match=r"are words \[1, 1, 2, 4\], not \[1, 1, 2, 1\]"):
        BlockTable(indices, counts, 64, 64, 128, 64, BlockBits(indices))
    with pytest.raises(ValueError, match="bool"):
        BlockTable.from_mask(torch.ones(1, 1, 2, 2), 64, 64, 128, 128)
