"""Profiles: a word for several options, on the command line, on the page and from Python."""

import copy
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import run
from tiny import tiny_wan
from torch import equal

import dit_accel
from dit_accel.api import step_cache_of
from dit_accel.app import form
from dit_accel.app.ask import BadField, Limits
from dit_accel.cli import main as cli
from dit_accel.generation import speeds
from dit_accel.generation.options import How

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import profiles  # noqa: E402


@pytest.mark.parametrize("name", speeds.NAMES)
def test_a_profile_is_its_options_and_what_is_given_replaces_them(name):
    own = speeds.options(name)
    how = How(speed=name)
    assert how.at_speed() == How(**own) and how.config() == How(**own).config()
    assert how.boost() == How(**own).boost()
    more = How(speed=name, step_cache=0.07, keep=0.9 if "keep" in own else None)
    assert more.boost().step_cache == 0.07
    assert "keep" not in own or more.config().method.keep == 0.9


def test_they_stand_in_the_order_of_their_names_and_reach_their_floors():
    found = [speeds.measured(name) for name in speeds.NAMES]
    assert all(figures["lowest"] >= figures["floor"] for figures in found)
    assert [f["work"] for f in found] == sorted((f["work"] for f in found), reverse=True)


@pytest.mark.parametrize("name", speeds.NAMES)
def test_a_pipeline_at_speed_and_back(name):
    pipe = tiny_wan(layers=3)
    stock = run(pipe, steps=6)
    fast = dit_accel.at_speed(pipe, name, min_tokens=0)
    assert run(pipe, steps=6).isfinite().all()
    ran = fast.report()
    assert ran.layers[1]["sparse"] + ran.layers[1]["dense"] <= 12
    cache = step_cache_of(pipe.transformer)
    assert cache.decision.threshold == How(speed=name).boost().step_cache
    fast.restore()
    fast.restore()
    assert step_cache_of(pipe.transformer) is None and equal(run(pipe, steps=6), stock)


def test_a_refusal_leaves_the_pipeline_as_it_was():
    pipe = tiny_wan()
    with pytest.raises(ValueError, match="no dense backend 'x'"):
        dit_accel.at_speed(pipe, "fast", dense="x")
    assert not any("accel" in name for name in vars(pipe.transformer))


def test_one_profile_takes_the_place_of_another_and_restore_takes_all_of_it_away():
    pipe = tiny_wan(layers=3)
    stock = run(pipe, steps=6)
    threshold = lambda: step_cache_of(pipe.transformer).decision.threshold  # noqa: E731
    for name in ("balanced", "fast"):
        dit_accel.at_speed(pipe, name, min_tokens=0)  # held by the pipeline alone
        assert threshold() == How(speed=name).boost().step_cache
    with pytest.raises(ValueError, match="no dense backend 'x'"):
        dit_accel.at_speed(pipe, "balanced", dense="x")
    assert threshold() == How(speed="fast").boost().step_cache
    fast = run(pipe, steps=6)
    assert not equal(fast, stock)
    other = copy.deepcopy(pipe)
    assert equal(run(other, steps=6), fast)
    dit_accel.restore(pipe)
    assert equal(run(pipe, steps=6), stock)
    assert not any("accel" in key for part in (pipe, pipe.transformer) for key in vars(part))


def test_an_unknown_profile_and_a_method_beside_one_are_told(capsys):
    with pytest.raises(ValueError, match="speed is one of conservative, balanced, fast, not 'x'"):
        How(speed="x").config()
    assert cli.run(["generate", "a cat", "--speed", "fast", "--method", "topk"]) == 2
    assert "speed 'fast' has a method of its own: leave out 'topk'" in capsys.readouterr().err


def test_the_page_takes_one_in_place_of_the_method():
    limits = Limits()
    side = {"method": "topk", "speed": "fast"}
    asked = form.read({"prompt": "a cat", "right": side}, limits, lambda kind, token: Path())
    assert asked.right == How(**speeds.options("fast"))
    with pytest.raises(BadField, match="speed is one of"):
        form.read({"right": {**side, "speed": "x"}}, limits, lambda kind, token: Path())


def test_the_script_takes_the_least_work_that_reaches_each_floor(tmp_path, monkeypatch):
    rows = [
        {"name": name, "options": {"method": name}, "prompt": str(i), "psnr": psnr + i}
        | {"time": 0.5, "kept": kept, "computed": 0.5}
        for name, psnr, kept in (("a", 49, 0.9), ("b", 41.5, 0.6), ("c", 36, 0.4), ("d", 20, 0.1))
        for i in (0, 1)
    ]
    rows.append({**rows[0], "name": "e", "psnr": 99, "kept": 0, "options": {"other": "x"}})
    rows.append({**rows[0], "name": "f", "psnr": 99, "kept": 0})  # on one of the two prompts
    found = profiles.profiles(rows, 0.5)
    chosen = {name: row["options"]["method"] for name, row in found.items()}
    assert chosen == {"conservative": "b", "balanced": "c", "fast": "c"}
    assert found["balanced"]["measured"]["work"] == pytest.approx(0.5 * (0.5 + 0.5 * 0.4))
    monkeypatch.setattr(profiles, "SPEEDS", tmp_path / "speeds.json")
    machine = {"gpu": None, "cpu": "a CPU", "torch": "2"}
    run = {"machine": machine, "clock": "processor", "steps": 20, "frames": 9, "prompts": ["x"]}
    run["model"] = "a model"
    profiles.write(found, run, 0.5)
    data = json.loads(profiles.SPEEDS.read_text())
    assert list(data["profiles"]) == list(speeds.NAMES) and data["measured_by"]["torch"]
    with pytest.raises(SystemExit, match="no candidate reaches the 38.0 dB"):
        profiles.profiles(rows[-3:], 0.5)


def test_the_kinds_of_steps_are_read_from_what_their_forwards_did():
    def forward(step, sparse, dense, kept):
        return {"step": step, "sparse": sparse, "dense": dense, "kept": kept}

    # two guidance passes of four layers: dense, full but for the first layer, sparse, skipped
    # after the first block, and one pass alone that skips
    ran = [(0, 4, 1.0), (4, 0, 0.8), (4, 0, 0.1), (1, 0, 1.0), (4, 0, 0.1)]
    steps = [forward(n, *ran[n]) for n in range(5) for _ in range(2)]
    steps[-1] = forward(4, 1, 0, 0.1)
    found = profiles.kinds(SimpleNamespace(steps=steps))
    assert found == ["dense", "full", "sparse", "skipped", "skipped"]


def test_restore_reaches_it_through_copies_other_pipelines_and_the_transformer():
    pipe = tiny_wan(layers=3)
    stock = run(pipe, steps=6)
    for others in (
        lambda: [copy.deepcopy(pipe)],
        lambda: [pickle.loads(pickle.dumps(pipe))],
        lambda: [type(pipe)(**pipe.components), pipe],
    ):
        dit_accel.at_speed(pipe, "fast", min_tokens=0)
        found = others()
        assert not equal(run(found[0], steps=6), stock)
        dit_accel.restore(found[0])
        for one in found:
            assert step_cache_of(one.transformer) is None and equal(run(one, steps=6), stock)
        dit_accel.at_speed(found[0], "balanced", min_tokens=0).restore()
        dit_accel.restore(pipe)
    dit_accel.at_speed(pipe.transformer, "fast", min_tokens=0)
    dit_accel.restore(pipe)
    assert equal(run(pipe, steps=6), stock)


def test_another_method_takes_its_place_for_good_or_for_the_length_of_a_block():
    pipe = tiny_wan(layers=3)
    stock = run(pipe, steps=6)
    speed = dit_accel.at_speed(pipe, "fast", min_tokens=0)
    fast = run(pipe, steps=6)
    with dit_accel.accelerated(pipe, "dense") as handle:
        assert equal(run(pipe, steps=6), stock) and handle.report().kept == 1
    assert equal(run(pipe, steps=6), fast)
    assert step_cache_of(pipe.transformer).decision.threshold == 0.15
    with pytest.raises(ValueError, match="no dense backend 'x'"):
        dit_accel.accelerate(pipe, "topk", dense="x")
    assert equal(run(pipe, steps=6), fast)
    dit_accel.accelerate(pipe, "dense")
    assert equal(run(pipe, steps=6), stock) and step_cache_of(pipe.transformer) is None
    speed.restore()
    dit_accel.restore(pipe)
    assert not any("accel" in name for name in vars(pipe.transformer))
