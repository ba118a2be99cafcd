"""A page that stays up: its process doesn't grow with the number of visits. `make test-slow`."""

import ctypes
import gc
import time
from collections import Counter
from typing import ClassVar

import pytest
import torch

from dit_accel.app.ask import Ask
from dit_accel.app.catalog import card
from dit_accel.app.desk import Desk
from dit_accel.app.studio import Studio
from dit_accel.generation.options import How, What

METHODS = ("topk", "pooled", "shared", "rettention")
RUNS = 8  # of each stretch: every method twice
MOST = 4  # MiB that two stretches may add: a quarter of one for each run
LIBC = ctypes.CDLL(None)


class MallInfo(ctypes.Structure):
    """What glibc's malloc tells of itself, in bytes."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_: ClassVar = [(name, ctypes.c_size_t) for name in _names.split()]


def in_use() -> float:
    """MiB that tensors, frames and libraries hold. Not the process's resident size: malloc keeps
    tens of MiB of freed memory for later, now more, now less."""
    gc.collect()
    LIBC.mallinfo2.restype = MallInfo
    info = LIBC.mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


def objects() -> Counter:
    """How many objects of each kind are alive, of those that the collector sees."""
    gc.collect()
    return Counter(type(x).__name__ for x in gc.get_objects())


def visit(desk: Desk, seed: int) -> None:
    how = How(METHODS[seed % len(METHODS)], min_tokens=0)
    what = What(card(None).words.examples(1)[0], seed=seed, steps=3, size="64x64", frames=9)
    job = desk.submit(Ask(what, right=how), {}, f"visitor {seed}")
    with job.leash.held():
        while not job.over:
            time.sleep(0.05)
    assert job.state == "done", job.note


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="needs the malloc of glibc 2.33")
def test_generations_leave_no_memory_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("dit_accel.app.desk.KEPT", 4)  # records of later runs take others' places
    desk = Desk(Studio(), tmp_path)
    desk.start()
    seeds, sizes, alive = iter(range(3 * RUNS)), [], []
    for _ in range(3):
        for _ in range(RUNS):
            visit(desk, next(seeds))
        sizes.append(in_use())
        alive.append(objects())
    desk.stop()
    more = (alive[1] - alive[0]) & (alive[2] - alive[1])  # not what came once
    said = (f"{size:.1f} after {RUNS * i} runs" for i, size in enumerate(sizes, 1))
    print("MiB in use:", ", ".join(said))
    assert sizes[2] - sizes[0] < MOST
    assert max(more.values(), default=0) < RUNS, more  # of no kind one more for each run
    held = [torch.ones(2**18) for _ in range(2 * RUNS)]  # 1 MiB for each run would be seen
    assert in_use() - sizes[0] > MOST
    assert (objects() - alive[2])["Tensor"] >= len(held)
