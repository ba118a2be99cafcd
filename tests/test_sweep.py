"""The sweep of launches, in Triton's interpreter."""

import json
from dataclasses import asdict

import pytest
import torch
from interpreter import interpreted

from dit_accel import bench
from dit_accel.bench import sweep
from dit_accel.cli import main as cli

pytest.importorskip("triton")
with interpreted():
    from dit_accel.kernels.block_sparse_attention import triton as kernel
    from dit_accel.kernels.launch import find

TINY = bench.Shape("tiny", 1, 1, 70, 64)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    monkeypatch.setattr(sweep, "_CHECKED", 70)
    if torch.cuda.is_available():
        pytest.skip("the sweep of a GPU takes minutes")


def run(**options):
    lines = []
    found = sweep.sweep(
        ["tiny"], 0.5, device="cpu", blocks=[(64, 64)], limit=2, echo=lines.append, **options
    )
    return found, lines


def test_candidates_are_checked_timed_and_written(tmp_path):
    out = tmp_path / "sweep.json"
    rows, lines = run(out=out)
    assert [row["serves_now"] for row in rows] == [True, False]
    assert all(row["ms"] > 0 and row["kept_tflops"] > 0 for row in rows)
    assert json.loads(out.read_text())["rows"] == rows
    assert lines[-1].startswith("fastest: Launch(") and "the row in use" in lines[-1]


def test_a_wrong_launch_is_no_winner(monkeypatch: pytest.MonkeyPatch):
    right = kernel.attend

    def wrong(q, k, v, out, lse, table, launch):
        right(q, k, v, out, lse, table, launch)
        if launch.provenance == "a candidate":
            out += 1

    monkeypatch.setattr(kernel, "attend", wrong)
    rows, lines = run()
    assert "ms" in rows[0] and rows[1]["error"].startswith("AssertionError")
    assert "1.00× the row in use" in lines[-1]


def test_hopper_tries_pairs_of_small_key_blocks_too():
    now = find("forward", 90, 128, 128)
    tried = {size: list(sweep.candidates(now, 128, size)) for size in (64, 128)}
    assert all(any(launch.pairs for launch in found) for found in tried.values())
    assert all(launch.pairs or launch.tile <= 64 for launch in tried[64])
    assert all(x.specialized or not (x.pairs or x.counter) for x in tried[64])
    assert "pairs=True, counter=True" in sweep._written(asdict(tried[64][-2]))
    assert ["lazy=8.0" in sweep._written(asdict(x)) for x in tried[64]].count(True) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dtype", "float16"], "leave --dtype out"),
        (["--backward"], "leave --backward out"),
        (["--clock", "cpu"], "leave --clock out"),
        (["--rounds", "3"], "leave --rounds out"),
        (["--keep", "0.1", "--keep", "0.2"], "leave --keep out but once"),
    ],
)
def test_options_that_it_does_not_take_are_named(words, says, capsys):
    assert cli.run(["bench", "--sweep", *words]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_without_a_gpu_it_is_refused(capsys):
    assert cli.run(["bench", "--sweep"]) == 2
    assert "it needs an NVIDIA GPU" in capsys.readouterr().err
