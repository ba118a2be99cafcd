"""benchmarks/selectors_table.py: its errors are those by hand, its last column is true."""

import sys
from pathlib import Path

import pytest
import torch

from dit_accel.methods import Call
from dit_accel.methods.topk import TopK

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from selectors_table import BASE, BEST, SIZED, Table, show  # noqa: E402

GRID = (5, 8, 8)


@pytest.fixture(scope="module")
def looked():
    """Two layers at two steps; what they were given."""
    torch.manual_seed(0)
    table = Table(["means", BASE, SIZED, "sub & window(t=1)"], [0.2, 0.6], 4)
    given = []
    for step in range(9):
        for layer in range(2):
            q, k, v = (2 * torch.randn(1, 3, 320, 16) for _ in range(3))
            dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            table.see(q, k, v, dense, Call(1.0, grid=GRID, step=step, layer=layer))
            given += [(q, k, v, dense)] if step in (4, 8) else []
    table.steps = 2
    return table.rows(), given


def test_errors_are_those_by_hand(looked):
    rows, given = looked
    for name in ("means", BASE):
        (row,) = (x for x in rows if (x["selector"], x["method"], x["keep"]) == (name, "topk", 0.6))
        errors = []
        for q, k, v, dense in given:
            out = TopK(0.6, 64, select=name)(q, k, v, Call(0.6, grid=GRID))
            errors.append(float((out - dense).norm() / dense.norm()))
        assert row["error"] == pytest.approx(sum(errors) / 4) and row["kept"] == pytest.approx(0.6)
    window = [x for x in rows if x["selector"] == SIZED]
    assert all(x["text"].startswith("window(") and x["kept"] <= x["keep"] + 0.1 for x in window)


def test_the_best_of_each_head_and_the_last_column(looked):
    rows, _ = looked
    for method in ("topk", "pooled"):
        errors = {
            x["selector"]: x["error"] for x in rows if (x["method"], x["keep"]) == (method, 0.6)
        }
        assert errors[BEST] <= min(errors["means"], errors[BASE]) + 1e-6
    lines = {line.split("|")[1].strip(" `"): line for line in show(rows, [0.2, 0.6])}
    assert lines["sub & window(t=1)"].endswith("| reads more |")
    assert lines[BASE].endswith("|  |")
    better = [x["error"] for x in rows if x["selector"] == "means"]
    base = [x["error"] for x in rows if x["selector"] == BASE]
    less = sum(a < b for a, b in zip(better, base, strict=True))
    word = {0: "no", 4: "yes"}.get(less, f"in {less} columns")
    assert lines["means"].endswith(f"| {word} |")
