"""A page that stays up: its process doesn't grow with the number of visits. `make test-slow`."""

import gc
import os
from pathlib import Path

import pytest

from dit_accel.app.ask import Ask, Side
from dit_accel.app.desk import Desk
from dit_accel.app.studio import Studio


def resident() -> float:
    """MiB of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_twenty_generations_leave_no_memory_behind(tmp_path):
    desk = Desk(Studio(), tmp_path)
    sizes = [resident()]
    for seed in range(25):
        side = Side(("topk", "pooled", "shared", "rettention")[seed % 4], small=True)
        ask = Ask("rocket on a blue background", right=side, seed=seed, steps=3)
        ask = Ask(**{**vars(ask), "width": 64, "height": 64, "frames": 9})
        assert list(desk.serve(f"visitor {seed}", ask))[-1][1]
        sizes.append(resident())
    print(f"MiB: {sizes[0]:.0f} at the start, {sizes[5]:.0f} after 5, {sizes[25]:.0f} after 25")
    assert sizes[25] - sizes[5] < 32
