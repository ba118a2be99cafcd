"""Pairs of clips: noise, schedule, progress, cancel, visitors at once."""

import base64
import io
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
import torch
from asks import ASK, DEFAULTS, DENSE, SPARSE, other, pair_of, small_studio
from graph_emulator import Emulated
from PIL import Image
from runs import run as generated
from tiny import tiny_wan

import dit_accel
from dit_accel.app import outcome, replay, views
from dit_accel.app.ask import Ask, config_of, label
from dit_accel.app.stop import Cancelled, Leash, check, stoppable
from dit_accel.app.studio import News, Studio
from dit_accel.generation.options import How
from dit_accel.ops import dispatch
from dit_accel.runtime import graphs


def hooks_of(pipe) -> int:
    parts = (p for p in pipe.components.values() if isinstance(p, torch.nn.Module))
    return sum(len(m._forward_pre_hooks) for part in parts for m in part.modules())


def test_both_sides_start_from_the_same_noise(studio, alone):
    same = pair_of(studio, replace(ASK, right=DENSE))
    assert np.array_equal(same.left.result.frames, same.right.result.frames)
    assert np.array_equal(same.left.result.frames, alone.left.result.frames)
    assert same.right.report is None and same.right.cells is None


def test_the_sparse_side_is_sparse_after_its_warm_up(alone):
    assert alone.right.report["kept"] < 1
    cells = np.array(alone.right.cells)
    assert cells.shape == (4, 2)
    assert (cells[0] == 1).all()
    assert np.allclose(cells[1:], 1 / 3)  # one of three key blocks
    assert not np.array_equal(alone.left.result.frames, alone.right.result.frames)


def test_short_sequences_run_dense_and_say_why(studio):
    pair = pair_of(studio, replace(ASK, right=replace(SPARSE, min_tokens=None)))
    assert pair.right.report["kept"] == 1
    assert any("crossover" in why for why in pair.right.report["unplanned"])


def test_pruning_goes_with_dense_and_sparse_attention_and_is_told(tmp_path):
    studio, left = small_studio(tiny_wan(layers=3)), How("dense", prune="fast")
    ask = replace(other(ASK, steps=8), left=left, right=replace(SPARSE, prune="fast"))
    pair = pair_of(studio, ask)
    assert label(left) == "dense, prune fast" and config_of(left).prune.keep == 0.35
    for run in (pair.left, pair.right):
        assert min(step["tokens"] for step in run.report["steps"]) < 1
    html = views.results(outcome.record(pair, tmp_path), "base")
    assert "part of the tokens through the middle of the model" in html


def test_what_the_command_line_has_runs_here_too(studio, tmp_path):
    """Negative prompt, guidance, sampler, fps and step cache, with what they are in the record."""
    what = replace(ASK.what, negative="a dog", guidance=3.0, fps=5.0, sampler="flow:3", steps=None)
    ask = Ask(what, right=How("topk", step_cache=0.5, min_tokens=0))
    pair = pair_of(studio, ask)
    data = outcome.record(pair, tmp_path)
    assert data["fps"] == 5 and data["steps"] == 4
    assert views.skipped(data) and "step cache 0.5" in data["right"]["label"]
    script = (tmp_path / "right.py").read_text()
    for word in ("a dog", "guidance_scale=3.0", "Boost(", 'install(pipe, "flow:3")'):
        assert word in script
    assert pair.right.facts["boost"]["step_cache"] == 0.5


def test_a_run_leaves_the_pipeline_stock(pipe, alone):
    assert "_dit_accel" not in pipe.transformer.__dict__
    assert hooks_of(pipe) == 0


def test_progress_tells_side_phase_and_shows_pictures(pipe):
    studio = Studio(lambda name: (pipe, DEFAULTS), find=lambda name: None)
    news = []
    studio.run(ASK, threading.Event(), news.append)
    news = [n for n in news if isinstance(n, News)]
    assert {n.side for n in news} == {"", "left", "right"}
    assert {"loading the model", "encode", "denoise", "decode"} <= {n.phase for n in news}
    assert [n.done for n in news if n.side == "right" and n.preview][0] == 1
    picture = next(n.preview for n in news if n.preview)
    data = base64.b64decode(picture.removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(data)).size == (16, 16)


def test_cancel_stops_within_a_step_and_leaves_no_trace(studio, pipe, alone):
    cancel, steps = threading.Event(), []

    def hear(item):
        if isinstance(item, News) and (item.side, item.phase) == ("right", "denoise"):
            steps.append(item.done)
            if item.done == 1:
                cancel.set()

    with pytest.raises(Cancelled):
        studio.run(ASK, cancel, hear)
    assert max(steps) <= 2
    assert hooks_of(pipe) == 0
    after = pair_of(studio, ASK)
    assert np.array_equal(after.right.result.frames, alone.right.result.frames)


def test_cancel_acts_inside_a_layer(pipe):
    """Before the second part of a block, not before the next block."""
    cancel, block = threading.Event(), pipe.transformer.blocks[0]
    parts = [m for m in block.modules() if not any(m.children())]
    seen = []
    hooks = [m.register_forward_pre_hook(lambda m, _: seen.append(m)) for m in parts]
    first = parts[0].register_forward_hook(lambda *_: cancel.set())
    with pytest.raises(Cancelled), stoppable(pipe, cancel):
        pipe("a cat", height=64, width=64, num_frames=9, num_inference_steps=1)
    for hook in (*hooks, first):
        hook.remove()
    assert 0 < len(seen) < len(parts)


def test_a_leash_ends_when_nobody_holds_it():
    leash = Leash(grace=0.05)
    with leash.held():
        time.sleep(0.1)
        check(leash)
    check(leash)
    time.sleep(0.1)
    with pytest.raises(Cancelled):
        check(leash)


def test_a_side_that_was_cancelled_while_it_warmed_up_is_still_cold(studio):
    cancel, phases = threading.Event(), []

    def hear(item):
        if isinstance(item, News):
            phases.append((item.side, item.phase))
            if item.phase == "warm-up" and not cancel.is_set():
                cancel.set()

    with pytest.raises(Cancelled):
        studio.run(ASK, cancel, hear)
    studio.run(ASK, threading.Event(), hear)
    assert phases.count(("left", "warm-up")) == 2


@pytest.mark.parametrize("right", [SPARSE, replace(SPARSE, step_cache=0.3)])
def test_what_waits_for_python_is_timed_as_graphs_and_shows_the_same(monkeypatch, right):
    studio, made, phases = small_studio(tiny_wan()), [], []
    ask = replace(ASK, right=right)
    wanted = pair_of(studio, ask)
    monkeypatch.setattr(replay, "waits", lambda pipe, result: True)
    monkeypatch.setattr(graphs, "Cuda", lambda: made.append(Emulated()) or made[-1])

    def hear(item):
        phases.append((item.side, item.phase) if isinstance(item, News) else item.name)

    found = studio.run(ask, threading.Event(), hear)
    used = [recorder.replayed for recorder in made if recorder.recorded]
    assert len(used) == 2 and min(used) > ASK.what.steps
    for side in ("left", "right"):
        one, other = getattr(wanted, side), getattr(found, side)
        assert np.array_equal(one.result.frames, other.result.frames)
        assert (other.label, other.graphs) == (f"{one.label}, CUDA graphs", True)
        assert one.cells == other.cells and (one.sight is None) == (other.sight is None)
    assert phases.count("left") == phases.count("right") == 1
    assert not hooks_of(studio._loaded.pipe)
    assert "forward" not in vars(studio._loaded.pipe.transformer)


def test_a_model_that_cannot_be_recorded_is_timed_as_it_ran(monkeypatch, caplog):
    studio = small_studio(tiny_wan())
    monkeypatch.setattr(replay, "waits", lambda pipe, result: True)
    caplog.set_level("INFO", "dit_accel")
    found = pair_of(studio, ASK)  # on a CPU
    assert not found.left.graphs and not found.right.graphs
    assert "graphs" not in found.left.label
    assert [r.getMessage() for r in caplog.records if "launched by Python" in r.getMessage()][
        1:
    ] == []
    assert "CUDA graphs are for transformers on one CUDA GPU" in caplog.text


def test_both_sides_are_timed_as_python_launched_them_where_one_cannot_be_recorded(monkeypatch):
    monkeypatch.setattr(replay, "waits", lambda pipe, result: True)
    timed = []

    def replayed(pipe, defaults, request, config, boost, cancel, tell):
        timed.extend([] if config else [replay.generate(pipe, defaults, request, tell)])
        return None if config else timed[0]

    monkeypatch.setattr(replay, "replayed", replayed)
    found = pair_of(small_studio(tiny_wan()), ASK)
    assert (found.left.label, found.left.graphs, found.left.fps) == ("dense", False, 8)
    assert timed and found.left.result is not timed[0] and found.left.facts
    assert not found.right.graphs


def test_steps_that_are_long_or_on_a_cpu_do_not_wait_for_python(alone):
    pipe = tiny_wan()
    assert not replay.waits(pipe, alone.left.result)
    assert not replay.could(replace(SPARSE, prune="fast")) and replay.could(DENSE)


def test_two_visitors_at_once_get_what_each_would_alone(studio, alone):
    another = replace(other(ASK, seed=7), right=DENSE)
    alone_too = pair_of(studio, another)
    found = {}

    def visit(name: str, ask: Ask) -> None:
        found[name] = pair_of(studio, ask)

    visitors = [threading.Thread(target=visit, args=a) for a in (("a", ASK), ("b", another))]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert np.array_equal(found["a"].right.result.frames, alone.right.result.frames)
    assert np.array_equal(found["b"].right.result.frames, alone_too.right.result.frames)


def test_one_model_is_kept_another_replaces_it_and_a_mistyped_one_does_not(pipe):
    loads = []

    def load(name):
        loads.append(name)
        return pipe, DEFAULTS

    def find(name):
        if name == "name/mistyped":
            raise ValueError("there is no such model")

    studio, quick = Studio(load, find=find), replace(other(ASK, steps=1), right=DENSE)
    pair_of(studio, quick)
    with pytest.raises(ValueError, match="no such model"):
        pair_of(studio, replace(quick, model="name/mistyped"))
    for model in (None, "name/other"):
        pair_of(studio, replace(quick, model=model))
    assert loads == [None, "name/other"]


def test_a_size_the_model_cannot_make_is_refused_in_a_sentence(studio):
    with pytest.raises(ValueError, match="width is a multiple of 16"):
        pair_of(studio, other(ASK, size="100x128"))


@pytest.mark.parametrize("order", ["raster", "hilbert"])
def test_the_attention_view_holds_the_tables_that_were_read(studio, order):
    run = pair_of(studio, replace(ASK, right=replace(SPARSE, order=order))).right
    sight = run.sight
    count = len(run.report["layers"])
    assert sight["grid"] == [3, 8, 8] and [layer for layer, _ in sight["layers"]] == list(
        range(count)
    )
    blocks = 3 * 8 * 8 // 64
    for _, text in sight["layers"]:
        rows = np.frombuffer(base64.b64decode(text), np.uint8).reshape(blocks, blocks)
        assert np.allclose(rows.mean(1) / 255, 1 / 3, atol=0.01)  # one of three, in each head
    if order == "raster":
        assert sight["order"] is None
    else:
        places = np.frombuffer(base64.b64decode(sight["order"]), np.int32)
        assert sorted(places) == list(range(192)) and list(places) != list(range(192))


def test_what_was_pruned_has_no_attention_view(studio, pipe):
    deep = small_studio(tiny_wan(layers=3))
    pair = pair_of(deep, replace(other(ASK, steps=8), right=replace(SPARSE, prune="fast")))
    assert pair.right.sight is None and pair.left.sight is None


def test_what_can_be_stopped_norms_and_turns_by_one_operator():
    """Hooks on the norms would send Wan's processors back to their own code."""
    pipe = tiny_wan(layers=2)
    now = {"schedule": dit_accel.Schedule(warmup=0), "min_tokens": 0}
    leash = Event()
    for held in (nullcontext(), stoppable(pipe, leash)):
        with dispatch.recording() as used, dit_accel.accelerated(pipe, "topk", **now), held:
            generated(pipe, steps=2)
        assert used.count("norm_rope/torch") == 2 * 2 * 2
    with pytest.raises(Cancelled), stoppable(pipe, leash):
        leash.set()
        generated(pipe, steps=1)
