"""Pattern × length × ranks: tables of one kept share, shares that together are the whole, rows."""

import json

import pytest
import torch

from dit_accel import bench, ops
from dit_accel.bench import axes, baselines, patterns
from dit_accel.bench.axes import Axes, run_axes
from dit_accel.bench.axes_table import markdown
from dit_accel.bench.patterns import PATTERNS
from dit_accel.bench.ranks import Way, fullest
from dit_accel.cli import main as cli

SMALL = bench.Shape("small", 1, 4, 300, 16)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, "small", SMALL)


def tokens(heads=4, n=1000, d=16):
    torch.manual_seed(0)
    return torch.randn(3, 1, heads, n, d)


def wanted(*names, **more):
    options = {"lengths": (300,), "rounds": 1, **more}
    return Axes(("small",), names or tuple(PATTERNS), **options)


@pytest.mark.parametrize("keep", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("name", PATTERNS)
def test_every_pattern_keeps_the_same_share(name, keep):
    q, k, _ = tokens()
    table = patterns.table(name, q, k, keep, 64)
    kept = max(1, -(-round(keep * 16 * 1000) // 1000))  # ⌈keep · 16⌉
    assert int(table.counts.sum()) == kept * 4 * 16
    mask = table.to_mask()
    assert torch.equal(mask.sum(-1), table.counts.long())  # no block twice
    assert torch.equal(table.indices.sort(-1).values, table.indices)


def test_patterns_have_their_shapes():
    q, k, _ = tokens(n=64 * 32)
    found = {name: patterns.table(name, q, k, 0.25, 64) for name in PATTERNS}
    masks = {name: table.to_mask()[0] for name, table in found.items()}
    equal = {name for name, table in found.items() if len(table.counts.unique()) == 1}
    assert equal == {"topk", "random", "window", "stripe"}
    assert equal == {name for name, table in found.items() if not table.uneven}
    assert masks["window"].diagonal(dim1=-2, dim2=-1).all()
    edges = (masks["window"].int().diff(dim=-1) != 0).sum(-1)
    assert edges.max() <= 2  # one run of blocks in each row
    assert (masks["stripe"] == masks["stripe"][:, :1]).all()
    assert not torch.equal(masks["stripe"][0], masks["stripe"][1])
    budgets = found["per-head"].counts[0]
    assert (budgets == budgets[:, :1]).all() and budgets[:, 0].tolist() == [2, 6, 10, 14]
    assert found["top-p"].counts.float().std() > 4


def test_what_cannot_be_shared_out_is_refused():
    assert patterns.shared_out(10, torch.ones(4), 3).sum() == 10
    assert patterns.shared_out(12, torch.tensor([100.0, 1, 1, 1]), 3).tolist() == [3, 3, 3, 3]
    with pytest.raises(ValueError, match="do not have the sum 13"):
        patterns.shared_out(13, torch.ones(4), 3)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["top-p", "per-head"])
def test_the_shares_of_all_ranks_are_the_whole(name, ranks):
    q, k, v = tokens()
    table = patterns.table(name, q, k, 0.3, 64)
    whole = ops.block_sparse_attention(q, k, v, table)
    for way, axis in zip(Way.all_of(ranks), (1, 2), strict=True):
        shares = way.shares(4, 1000, 64)
        parts = [ops.block_sparse_attention(*s.of(q, k, v), s.table(table)) for s in shares]
        torch.testing.assert_close(torch.cat(parts, axis), whole)
        kept = [int(share.table(table).counts.sum()) for share in shares]
        rank, balance = fullest(shares, table, ranks)
        assert kept[rank] == max(kept) and sum(kept) == int(table.counts.sum())
        assert balance == pytest.approx(max(kept) * ranks / sum(kept))


def test_what_a_rank_receives():
    q = torch.empty(1, 12, 4096, 128, dtype=torch.bfloat16)
    ulysses, gather = (way.received(q) for way in Way.all_of(2))
    assert ulysses == gather == q.numel() * 2  # q, k, v and out: a quarter each; k and v: a half
    filled, _ = (way.received(q) for way in Way.all_of(8))
    assert filled == 4 * 7 / 64 * 16 / 12 * q.numel() * 2


def test_rows_have_times_ratios_and_errors(tmp_path):
    out = tmp_path / "rows.json"
    rows = run_axes(wanted("topk", "top-p", ranks=(1, 2), keeps=(0.5,)), "cpu", out)
    assert json.loads(out.read_text())["rows"] == rows
    ways = [(row["ranks"], row["way"]) for row in rows[::2]]
    assert ways == [(1, "alone"), (2, "ulysses"), (2, "gather")]
    for row in rows:
        assert row["check"] == "passed" and row["relative_error"] < 1e-5
        ratio = row["dense_ms"] / row["attention_ms"]
        assert row["ratio"] == pytest.approx(ratio, rel=0.1, abs=0.01)
    # five blocks of queries are three and two; four heads are two and two
    assert [row["balance"] for row in rows[::2]] == [1.0, 1.0, 1.2]
    assert rows[1]["balance"] == 1 and rows[3]["balance"] > 1
    table = markdown(rows).splitlines()
    assert len(table) == 5 and table[0].endswith("| topk | top-p |")
    assert "| 2 gather |" in table[4]


def test_no_ratio_for_a_wrong_result(monkeypatch):
    right = ops.block_sparse_attention
    monkeypatch.setattr(ops, "block_sparse_attention", lambda *x: right(*x) + 1e-3)
    (row,) = run_axes(wanted("topk"), "cpu")
    assert row["ratio"] is None and "largest error" in row["check"]
    assert "check failed" in markdown([row])


def test_what_does_not_fit_is_a_row(monkeypatch):
    def full(runs, *how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(axes, "times", full)
    said = []
    (row,) = run_axes(wanted("topk"), "cpu", echo=said.append)
    assert row["error"] in said[0] and row["check"] == "not run"


def test_others_are_held_against_the_same_table(monkeypatch):
    def gpu(q, k, v, table, flex):
        assert not flex
        right = ops.block_sparse_attention(q, k, v, table)
        return {"cudnn": lambda: q, "bsa": lambda: right * 1.01}, {"flash4": "it is not installed"}

    monkeypatch.setattr(axes.operators, "extras", lambda device: True)
    monkeypatch.setattr(baselines, "gpu", gpu)
    first, second = run_axes(wanted("topk", "stripe"), "cpu")
    assert first["dense_best"] == "cudnn" and first["cudnn_ms"] == second["cudnn_ms"]
    assert first["bsa_ms"] > 0 and first["bsa_error"] == pytest.approx(0.01)
    assert first["flash4_absent"] == "it is not installed"


def test_command_line(capsys):
    words = ["--shape", "small", "--pattern", "topk,window", "--length", "1k", "300", "--ranks=2"]
    assert cli.run(["bench", *words, "--rounds", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert (
        "| small | 1024 | 0.1 | 2 ulysses |" in said and "| small | 300 | 0.1 | 2 gather |" in said
    )


@pytest.mark.parametrize(
    "words, why",
    [
        ("--pattern diagonal", "unknown pattern 'diagonal'; the benchmark has topk, random"),
        ("--length 8m", "length is a list of whole numbers with commas between, not '8m'"),
        ("--length 8", "a length is at least a block of 64 tokens, not 8"),
        ("--ranks 0", "ranks are numbers of processes ≥ 1, not 0"),
        ("--ranks 9 --length 300", "300 tokens in blocks of 64 are too few for 9 ranks"),
        ("--pattern topk --backward", "--backward has no patterns, lengths or ranks"),
        ("--pattern topk --e2e", "--pattern belongs to operators, not to whole models"),
    ],
)
def test_bad_input(words, why, capsys):
    assert cli.run(["bench", "--device", "cpu", "--shape", "small", *words.split()]) == 2
    assert why in " ".join(capsys.readouterr().err.split())
