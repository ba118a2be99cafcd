import pytest
import torch

from dit_accel.forward.order import inverse, token_order

GRIDS = [(1, 1, 1), (3, 4, 4), (5, 16, 16), (2, 7, 9), (4, 4, 4)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["tile", "hilbert", "time"])
def test_orders_are_permutations_with_an_inverse(kind, grid):
    index = token_order(kind, grid, (2, 4, 4))
    n = grid[0] * grid[1] * grid[2]
    assert torch.equal(index.sort().values, torch.arange(n))
    x = torch.randn(n)
    assert torch.equal(x[index][inverse(index)], x)


def test_raster_is_no_permutation():
    assert token_order("raster", (3, 4, 4)) is None


def test_tiles_fill_whole_blocks():
    index = token_order("tile", (2, 16, 16), (1, 8, 8))
    rows, columns = index[:64] // 16 % 16, index[:64] % 16
    assert rows.max() == columns.max() == 7 and index[:64].max() < 256


def test_time_follows_a_place_through_all_frames():
    index = token_order("time", (3, 2, 2))
    assert index.tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


def test_hilbert_steps_to_a_neighbour_each_time():
    index = token_order("hilbert", (4, 4, 4))
    cells = torch.stack([index // 16, index // 4 % 4, index % 4], -1)
    assert (cells.diff(dim=0).abs().sum(-1) == 1).all()


def test_unknown_order():
    with pytest.raises(ValueError, match="raster, tile, hilbert, time"):
        token_order("zigzag", (1, 2, 2))
