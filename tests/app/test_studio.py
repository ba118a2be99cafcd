"""Pairs of clips: noise, schedule, progress, cancel, visitors at once."""

import base64
import io
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from asks import ASK, DEFAULTS, SPARSE, pair_of
from PIL import Image
from tiny import tiny_wan

from dit_accel.app import outcome, views
from dit_accel.app.ask import Ask, Side
from dit_accel.app.stop import Cancelled
from dit_accel.app.studio import News, Studio


def hooks_of(pipe) -> int:
    parts = (p for p in pipe.components.values() if isinstance(p, torch.nn.Module))
    return sum(len(m._forward_pre_hooks) for part in parts for m in part.modules())


def test_both_sides_start_from_the_same_noise(studio, alone):
    same = pair_of(studio, replace(ASK, right=Side()))
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
    pair = pair_of(studio, replace(ASK, right=replace(SPARSE, small=False)))
    assert pair.right.report["kept"] == 1
    assert any("crossover" in why for why in pair.right.report["unplanned"])


def test_pruning_goes_with_dense_and_sparse_attention_and_is_told(tmp_path):
    deep, left = tiny_wan(layers=3), Side(prune="fast")
    studio = Studio(lambda name: (deep, DEFAULTS))
    pair = pair_of(studio, replace(ASK, left=left, right=replace(SPARSE, prune="fast"), steps=8))
    assert left.label == "dense, prune fast" and left.config().prune.keep == 0.35
    for run in (pair.left, pair.right):
        assert min(step["tokens"] for step in run.report["steps"]) < 1
    html = views.results(outcome.record(pair, tmp_path), "base")
    assert "part of the tokens through the middle of the model" in html
    with pytest.raises(ValueError, match="cannot run on pruned ones"):
        Side("shared", prune="fast")
    with pytest.raises(ValueError, match="prune is the share of the tokens"):
        Side(prune="brutal")


def test_a_run_leaves_the_pipeline_stock(pipe, alone):
    assert "_dit_accel" not in pipe.transformer.__dict__
    assert hooks_of(pipe) == 0


def test_progress_tells_side_phase_and_shows_pictures(studio):
    news = [n for n in studio.run(ASK, threading.Event()) if isinstance(n, News)]
    assert {n.side for n in news} == {"", "left", "right"}
    assert {"loading the model", "encode", "denoise", "decode"} <= {n.phase for n in news}
    assert [n.done for n in news if n.side == "right" and n.preview][0] == 1
    picture = next(n.preview for n in news if n.preview)
    data = base64.b64decode(picture.removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(data)).size == (16, 16)


def test_cancel_stops_within_a_step_and_leaves_no_trace(studio, pipe, alone):
    cancel, steps = threading.Event(), []
    with pytest.raises(Cancelled):
        for news in studio.run(ASK, cancel):
            if isinstance(news, News) and (news.side, news.phase) == ("right", "denoise"):
                steps.append(news.done)
                if news.done == 1:
                    cancel.set()
    assert max(steps) <= 2
    assert hooks_of(pipe) == 0
    after = pair_of(studio, ASK)
    assert np.array_equal(after.right.result.frames, alone.right.result.frames)


def test_leaving_the_iterator_cancels(studio):
    cancel = threading.Event()
    job = studio.run(ASK, cancel)
    next(job)
    job.close()
    assert cancel.is_set()
    assert pair_of(studio, ASK).right.cells  # the lock is free again


def test_two_visitors_at_once_get_what_each_would_alone(studio, alone):
    other = replace(ASK, seed=7, right=Side())
    alone_too = pair_of(studio, other)
    found = {}

    def visit(name: str, ask: Ask) -> None:
        found[name] = pair_of(studio, ask)

    visitors = [threading.Thread(target=visit, args=a) for a in (("a", ASK), ("b", other))]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert np.array_equal(found["a"].right.result.frames, alone.right.result.frames)
    assert np.array_equal(found["b"].right.result.frames, alone_too.right.result.frames)


def test_one_model_is_kept_and_another_replaces_it(pipe):
    loads = []

    def load(name):
        loads.append(name)
        return pipe, DEFAULTS

    studio = Studio(load)
    for model in (None, None, "name/other"):
        pair_of(studio, replace(ASK, steps=1, right=Side(), model=model))
    assert loads == [None, "name/other"]


def test_a_size_the_model_cannot_make_is_refused_in_a_sentence(studio):
    with pytest.raises(ValueError, match="width is a multiple of 16"):
        pair_of(studio, replace(ASK, width=100))
