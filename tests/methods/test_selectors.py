"""The static windows and Rectified's critical set."""

import pytest
import torch

from dit_accel import ops
from dit_accel.forward.order import token_order
from dit_accel.methods import Call
from dit_accel.methods.rectified import Rectified
from dit_accel.methods.selectors.base import expanded
from dit_accel.methods.selectors.near import neighbours
from dit_accel.methods.selectors.window import window_rows

CPU = torch.device("cpu")


def window(kind="tile", grid=(3, 16, 16), n_keys=None, keep=0.3, index=None, text_first=False):
    n_keys = n_keys or grid[0] * grid[1] * grid[2]
    return window_rows(kind, grid, n_keys, keep, 64, 64, index, text_first, CPU)


def test_a_tile_sees_itself_in_every_frame():
    grid = (3, 16, 16)  # 4 tiles of 8 × 8 in each of 3 frames
    index = token_order("tile", grid, (1, 8, 8))
    mask = window(grid=grid, keep=0.25, index=index).to_mask()[0, 0]
    assert (mask.sum(-1) == 3).all()
    for block in range(12):
        assert mask[block].nonzero().flatten().tolist() == [block % 4 + 4 * t for t in range(3)]


def test_the_nearest_frame_wins_where_not_all_fit():
    index = token_order("tile", (3, 16, 16), (1, 8, 8))
    mask = window(keep=0.16, index=index).to_mask()[0, 0]  # 2 of 12
    assert mask[0].nonzero().flatten().tolist() == [0, 4]
    assert mask[11].nonzero().flatten().tolist() == [7, 11]


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("kind", ["tile", "raster"])
def test_text_is_always_read_and_the_count_is_exact(kind: str, text_first: bool):
    rows = window(kind, (2, 16, 16), 512 + 77, 0.4, text_first=text_first)
    mask = rows.to_mask()[0, 0]  # 10 key blocks, of which two hold text
    text = [0, 1] if text_first else [8, 9]
    assert mask[:, text].all() and (mask.sum(-1) == 2 + 4).all()


def test_raster_and_tile_windows_agree_on_whole_rows():
    assert torch.equal(window("raster").to_mask(), window("tile").to_mask())


def test_ragged_grid_and_full_window():
    assert window(grid=(2, 9, 7), keep=1.0).to_mask().all()
    table = expanded(window(grid=(2, 9, 7)), 2, 3)
    assert table.counts.shape == (2, 3, 2) and (table.counts == 1).all()


def naive_critical_set(q, k, keep, mass, block, near, forced, scale):
    """Section by section as the equations have it, one row at a time."""
    blocks = k.split(block)
    km = torch.stack([b.mean(0) for b in blocks])
    sizes = torch.tensor([float(len(b)) for b in blocks])
    rows = []
    for n, rows_q in enumerate(q.split(block)):
        # plain top-k goes by the score alone
        a = (km @ rows_q.mean(0) * scale + sizes.log() * (mass > 0)).softmax(0)
        total, chosen = a[list(forced)].sum(), set()
        wanted = max(1, -(-len(blocks) * keep // 1))
        for m in a.argsort(descending=True).tolist():
            if m in forced:
                continue
            if len(chosen) >= wanted and total > mass:
                break
            chosen.add(m)
            total = total + a[m]
        rows.append(chosen | forced | ({n - 1, n, n + 1} if near else set()))
    return [sorted(m for m in row if 0 <= m < len(blocks)) for row in rows]


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("forced", [set(), {9}, {0, 1}])
@pytest.mark.parametrize("keep,mass", [(0.2, 0.0), (0.2, 0.6), (0.5, 0.3), (1.0, 0.3), (0.1, 0.95)])
def test_the_critical_set_is_the_equations(near: bool, forced: set, keep: float, mass: float):
    q, k = torch.randn(1, 1, 610, 16) + torch.randn(610, 1) / 4, torch.randn(1, 1, 610, 16)
    q, k = (x + 2 * torch.randn(10, 16).repeat_interleave(64, 0)[:610] for x in (q, k))
    mask = torch.zeros(10, dtype=torch.bool)
    mask[list(forced)] = True
    close = neighbours(610, 610, 64, 64, 1, 0, CPU) if near else None
    close = {"near": close.mask, "max_near": close.width} if near else {}
    table = ops.block_table(q, k, keep, mass=mass, forced=mask, scale=0.25, **close)
    expected = naive_critical_set(q[0, 0], k[0, 0], keep, mass, 64, near, forced, 0.25)
    assert [row.nonzero().flatten().tolist() for row in table.to_mask()[0, 0]] == expected


@pytest.mark.parametrize("kv_len", [100, 128, torch.tensor([300, 37])])
def test_padding_is_never_chosen(kv_len: int | torch.Tensor):
    q, k = torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    near = neighbours(300, 300, 64, 64, 1, 0, CPU)
    mask = ops.block_table(q, k, 0.9, mass=0.9, near=near.mask, kv_len=kv_len).to_mask()
    for b, end in enumerate(torch.as_tensor(kv_len).expand(2).tolist()):
        held = -(-end // 64)
        assert not mask[b, ..., held:].any() and mask[b, ..., :held].any(-1).all()


def test_neighbours_follow_the_text():
    near = neighbours(128, 128 + 40, 64, 64, 0, 40, CPU)
    # queries 0–63 are keys 40–103 (blocks 0, 1), queries 64–127 keys 104–167 (blocks 1, 2)
    assert near.mask.tolist() == [[True, True, False], [False, True, True]] and near.width == 2


def test_rectified_reports_what_it_reads():
    seen = []
    q, k, v = (torch.randn(1, 2, 640, 16) for _ in range(3))
    call = Call(keep=0.2, note=seen.append)
    out = Rectified(keep=0.2)(q, k, v, call)
    assert out.shape == q.shape and 0.2 < float(seen[0].density()) < 0.6
