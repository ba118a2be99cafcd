"""What the compiler makes of the kernels for GPUs that are not there: no spill, loads in flight."""

import pytest
from compiling import compiled

# Bytes of shared memory that one program may have.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
SHARED_86 = 99 * 1024
TILED = ("forward", "dq", "dkdv", "int8")


def spill(row: dict) -> int:
    """Bytes of stack that a row may use."""
    if "benchmarks/results" in row["provenance"]:
        return 512  # the fastest all the same
    # what the epilogue of the 8-bit kernel needs waits in memory during its loop
    return 32 if row["op"] == "int8" else 0


def check(row: dict) -> None:
    capability = row["capability"]
    assert row["stack"] <= spill(row), row
    assert row["shared"] <= SHARED[capability], row
    assert capability != 80 or row["shared"] <= SHARED_86, row
    if row["op"] in TILED:
        assert row["cp_async"] + row["tma"] > 2, row
        assert row["wgmma"] > 0 if capability in (90, 100) else row["mma"] > 0, row
    if row["op"] == "forward" and capability in (90, 100) and row["head_dim"] in (64, 128):
        assert row["tma"] > 0, row


def test_the_main_rows():
    wanted = ("forward@80", "forward@90", "dq@90", "dkdv@90", "forward@100", "int8@90")
    linear = ("state@80", "state@90", "project@80", "block_state@80", "linear@80")
    linear += ("linear_backward@80",)
    rows = compiled(*wanted, *linear)
    assert len(rows) == 33
    for row in rows:
        check(row)


@pytest.mark.slow
def test_every_row():
    rows = compiled()
    assert {row["capability"] for row in rows} == set(SHARED)
    for row in rows:
        check(row)
