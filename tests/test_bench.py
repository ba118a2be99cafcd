"""The benchmark: its rows, its refusal, its baselines."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from dit_accel import bench
from dit_accel.bench import baselines, operators
from dit_accel.bench.results import line
from dit_accel.cli import main as cli
from dit_accel.kernels.block_sparse_attention import reference
from dit_accel.table import BlockTable


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "small", bench.Shape("small", 1, 2, 300, 16))


@pytest.mark.parametrize("op", bench.OPS)
def test_a_row_has_times_ratio_and_error(op: str, tmp_path):
    out = tmp_path / "rows.json"
    (row,) = bench.run_bench([op], ["small"], [0.5], "cpu", out, rounds=1)
    assert row["check"] == "passed" and row["relative_error"] < 1e-5
    assert row["ratio"] == pytest.approx(row["dense_ms"] / row["ours_ms"], rel=0.1, abs=0.01)
    assert row["density"] == 0.6 and row["implementation"] == "torch"
    record = json.loads(out.read_text())
    assert record["rows"] == [row]
    assert record["machine"]["torch"] == torch.__version__ and record["command"]


def test_no_ratio_for_a_wrong_result(monkeypatch: pytest.MonkeyPatch):
    right = operators.ops.block_sparse_attention
    monkeypatch.setattr(operators.ops, "block_sparse_attention", lambda *x: right(*x) + 1e-3)
    (row,) = bench.run_bench(["block_sparse_attention"], ["small"], [0.5], "cpu", rounds=1)
    assert row["ratio"] is None and "largest error" in row["check"]
    assert "check failed" in line(row)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown name 'wan'; the benchmark has"):
        bench.run_bench(shapes=["wan"])
    with pytest.raises(ValueError, match="unknown name 'dense'"):
        bench.run_bench(["dense"])


def test_command_line(capsys: pytest.CaptureFixture):
    arguments = ["--op", "block_sparse_attention", "--shape", "small", "--rounds", "1"]
    assert cli.run(["bench", *arguments, "--device", "cpu"]) == 0
    assert "[1,2,300,16]" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_reads_the_same_table():
    q, k, v = torch.randn(1, 2, 128, 16), *torch.randn(2, 1, 2, 256, 16)
    table = BlockTable.from_mask(torch.eye(2, 4).bool().expand(1, 2, 2, 4), 64, 64, 128, 256)
    mask = baselines.flex_mask(table)
    assert torch.equal(mask.to_dense().bool(), table.to_mask())
    out = flex_attention(q, k, v, block_mask=mask)
    wanted = F.scaled_dot_product_attention(q, k, v, reference.token_mask(table))
    torch.testing.assert_close(out, wanted)
