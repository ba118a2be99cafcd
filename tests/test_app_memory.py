"""A page that stays up: its process doesn't grow with the number of visits. `make test-slow`."""

import gc
import os
import time
from pathlib import Path

import pytest

from dit_accel.app.ask import Ask
from dit_accel.app.catalog import card
from dit_accel.app.desk import Desk
from dit_accel.app.studio import Studio
from dit_accel.generation.options import How, What


def resident() -> float:
    """MiB of this process in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_twenty_generations_leave_no_memory_behind(tmp_path):
    desk = Desk(Studio(), tmp_path)
    desk.start()
    prompt = card(None).words.examples(1)[0]
    sizes = [resident()]
    for seed in range(25):
        how = How(("topk", "pooled", "shared", "rettention")[seed % 4], min_tokens=0)
        ask = Ask(What(prompt, seed=seed, steps=3, size="64x64", frames=9), right=how)
        job = desk.submit(ask, {}, f"visitor {seed}")
        with job.leash.held():
            while not job.over:
                time.sleep(0.05)
        assert job.state == "done", job.note
        sizes.append(resident())
    desk.stop()
    print(f"MiB: {sizes[0]:.0f} at the start, {sizes[5]:.0f} after 5, {sizes[25]:.0f} after 25")
    assert sizes[25] - sizes[5] < 32
