"""The page without a browser: requests, jobs, cancel, visitors, files, the command line."""

import argparse
import base64
import io
import json
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_wan

from dit_accel.app import examples, launch, outcome, preview, server, stage, views
from dit_accel.app.ask import Ask, Limits, Side
from dit_accel.app.desk import KEPT, Desk
from dit_accel.app.form import Form
from dit_accel.app.page import build
from dit_accel.app.stop import Cancelled
from dit_accel.app.studio import Pair, Progress, Studio
from dit_accel.loading import Defaults

DEFAULTS = Defaults(
    height=128,
    width=128,
    num_frames=9,
    num_inference_steps=4,
    guidance_scale=1.0,
    max_sequence_length=16,
    fps=8,
)
SPARSE = Side("topk", keep=0.3, warmup=0.25, small=True)
ASK = Ask("a red rocket", right=SPARSE, steps=4)


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan()


@pytest.fixture
def studio(pipe):
    return Studio(lambda name: (pipe, DEFAULTS))


def pair_of(studio: Studio, ask: Ask) -> Pair:
    return list(studio.run(ask, threading.Event()))[-1]


@pytest.fixture(scope="module")
def alone(pipe) -> Pair:
    return pair_of(Studio(lambda name: (pipe, DEFAULTS)), ASK)


def hooks_of(pipe) -> int:
    parts = (p for p in pipe.components.values() if isinstance(p, torch.nn.Module))
    return sum(len(m._forward_pre_hooks) for part in parts for m in part.modules())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "  "}, "empty"),
        ({"prompt": None}, "empty"),
        ({"prompt": "x" * 501}, "501 characters"),
        ({"steps": 0}, "Steps is a whole number from 1 to 100"),
        ({"steps": 101}, "from 1 to 100"),
        ({"width": 1281}, "Width is a whole number from 16 to 1280"),
        ({"height": 8}, "Height"),
        ({"frames": 130}, "Frames is a whole number from 1 to 129"),
        ({"frames": 4.5}, "Frames"),
        ({"frames": True}, "Frames"),
        ({"seed": -1}, "Seed"),
        ({"seed": None}, "Seed"),
    ],
)
def test_a_request_outside_the_limits_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(ASK, **change)


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"method": "magic"}, "unknown method"),
        ({"method": "topk:insane"}, "no preset"),
        ({"method": "topk", "keep": 0.0}, "keep is the share"),
        ({"method": "topk", "keep": 2.0}, "keep is the share"),
        ({"warmup": -0.1}, "warm-up"),
        ({"method": "topk", "order": "zigzag"}, "unknown token order|unknown order"),
    ],
)
def test_a_bad_side_is_refused(side, words):
    with pytest.raises(ValueError, match=words):
        Side(**side)


def test_a_public_page_runs_only_the_operators_models():
    limits = Limits.for_public(("name/model",))
    assert Ask("a cat", limits=limits, model="name/model").model == "name/model"
    for model in ("other/model", "/etc", "../secret"):
        with pytest.raises(ValueError, match="public"):
            Ask("a cat", limits=limits, model=model)
    with pytest.raises(ValueError, match="from 16 to 512"):
        Ask("a cat", limits=limits, width=1280)


def test_a_models_own_defaults_are_held_to_the_limits():
    big = replace(DEFAULTS, num_frames=257)
    with pytest.raises(ValueError, match="257 is more than 129"):
        ASK.request(big)
    assert replace(ASK, frames=9).request(big).frames == 9


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
    news = [n for n in studio.run(ASK, threading.Event()) if isinstance(n, Progress)]
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
            if isinstance(news, Progress) and (news.side, news.phase) == ("right", "denoise"):
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


def test_the_desk_writes_only_in_its_folder(studio, tmp_path):
    desk = Desk(studio, tmp_path / "jobs")
    found = list(desk.serve("ann", ASK))
    value, html = found[-1]
    assert html and all(text is None for _, text in found[:-1])
    (folder,) = (tmp_path / "jobs").iterdir()
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *(f"{side}.{kind}" for side in stage.SIDES for kind in ("mp4", "json", "py")),
        "side_by_side.mp4",
        outcome.RECORD,
    }
    assert value["left"]["src"] == f"gradio_api/file={folder}/left.mp4"
    assert value["frames"] == 9 and value["fps"] == 8
    assert all(name in html for name in names)


def test_the_record_reproduces_the_run(alone, tmp_path):
    from dit_accel import AccelConfig

    data = outcome.record(alone, tmp_path)
    assert json.loads((tmp_path / outcome.RECORD).read_text())["right"]["cells"]
    config = AccelConfig.from_dict(json.loads((tmp_path / "right.json").read_text()))
    assert config == SPARSE.config()
    script = (tmp_path / "right.py").read_text()
    compile(script, "right.py", "exec")
    assert "dit_accel.accelerate(pipe, " in script and "a red rocket" in script
    assert "keep=0.3" in script
    assert len(data["quality"]["psnr"]) == 9
    assert "/" not in data["left"]["clip"]


def test_a_visitors_new_job_ends_the_one_before(studio, tmp_path):
    desk = Desk(studio, tmp_path)
    first = desk.serve("ann", ASK)
    next(first)
    second = desk.serve("ann", replace(ASK, steps=1))
    next(second)
    with pytest.raises(Cancelled):
        list(first)
    assert list(second)[-1][1]
    desk.cancel("ann")  # nothing runs: nothing happens
    desk.cancel("bob")


def test_cancel_reaches_only_the_visitor_who_asked(studio, tmp_path):
    desk = Desk(studio, tmp_path)
    job = desk.serve("ann", replace(ASK, steps=1))
    next(job)
    desk.cancel("bob")
    assert list(job)[-1][1]
    job = desk.serve("ann", ASK)
    next(job)
    desk.cancel("ann")
    with pytest.raises(Cancelled):
        list(job)


def test_old_files_are_removed(studio, tmp_path):
    desk = Desk(studio, tmp_path)
    folders = [desk._new_folder() for _ in range(KEPT + 3)]
    assert [f.exists() for f in folders] == [False] * 3 + [True] * KEPT


def test_what_visitors_type_is_escaped(alone, tmp_path):
    nasty = replace(alone.ask, prompt="<script>alert(1)</script>")
    data = outcome.record(replace(alone, ask=nasty), tmp_path)
    html = views.results(data, "base")
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert views.sentence(ValueError("<b>no</b>")) == "&lt;b&gt;no&lt;/b&gt;."


def test_the_heat_map_has_a_cell_per_layer_and_step():
    layers = [{"name": "blocks.0"}, {"name": "blocks.1"}]
    html = views.heat_map([[1.0, 0.25], [0.5, None]], layers)
    assert html.count('title="step ') == 3
    assert "step 1, blocks.1: 25% kept" in html and "step 1, blocks.0: dense" in html


def test_the_stage_keeps_a_finished_side_when_the_other_is_cancelled(alone):
    value = stage.waiting(ASK)
    value = stage.finished(value, alone.left, "url/left.mp4", 8)
    value = stage.moved(value, Progress("right", "denoise", 2, 4))
    assert value["right"]["share"] == 0.5 and value["right"]["state"] == "denoising, 2 of 4"
    value = stage.stopped(value, "cancelled")
    assert value["left"]["src"] == "url/left.mp4"
    assert value["right"]["state"] == "cancelled" and not value["right"]["busy"]


def test_the_clean_clip_is_read_off_two_steps():
    clean, noise = torch.randn(2, 1, 4, 3, 8, 8)
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])

    class FlowMatchFake:
        config: dict = {}

    scheduler = FlowMatchFake()
    scheduler.sigmas = sigmas
    drawing = preview.Preview(SimpleNamespace(scheduler=scheduler), ratio=1.0)
    drawing.before = (1 - sigmas[0]) * clean + sigmas[0] * noise
    now = (1 - sigmas[1]) * clean + sigmas[1] * noise
    assert torch.allclose(drawing._clean(1, now), clean, atol=1e-5)


def test_colours_are_learnt_from_what_was_decoded():
    latents = torch.randn(1, 16, 3, 8, 6)
    mixing = torch.randn(3, 16) * 0.05
    true = torch.einsum("kc,chw->hwk", mixing, latents[0, :, 0]) + 0.5
    frame = (true.clamp(0, 1) * 255).round().byte().numpy().repeat(8, 0).repeat(8, 1)
    colours = preview.fit_colours(latents, frame, ratio=8 / 6)
    drawn = preview.linear(latents[0, :, 0], colours)
    assert np.abs(drawn.astype(int) - (true.clamp(0, 1) * 255).numpy()).mean() < 8


def test_previews_of_packed_latents_have_the_clips_shape():
    plane = preview._plane(torch.randn(1, 6 * 12, 16), ratio=0.5)
    assert plane.shape == (16, 6, 12)
    picture = preview.principal(plane)
    assert picture.shape == (6, 12, 3) and picture.dtype == np.uint8 and picture.std() > 0


def test_the_form_makes_the_request_it_shows(studio, tmp_path):
    tiles = Side("rettention:fast", keep=0.05, warmup=0.2, order="tile")
    for sides in ((Side(), tiles), (Side(prune="safe"), replace(SPARSE, prune="fast"))):
        values = Form.values("a cat", sides, 3, 12, (64, 32, 9))
        ask = Form.ask(*values, limits=Limits())
        assert (ask.left, ask.right) == sides
    assert (ask.seed, ask.steps, ask.width, ask.height, ask.frames) == (3, 12, 64, 32, 9)
    demo = build(Desk(studio, tmp_path), Limits())
    assert len(demo.fns) > 0
    assert all(fn.api_visibility == "private" for fn in demo.fns.values() if fn.api_name)


@pytest.fixture(scope="module")
def address(pipe, tmp_path_factory):
    jobs = tmp_path_factory.mktemp("jobs")
    (jobs / "clip.txt").write_text("here")
    demo = build(Desk(Studio(lambda name: (pipe, DEFAULTS)), jobs), Limits.for_public())
    _, url, _ = demo.launch(
        server_name="127.0.0.1",
        prevent_thread_lock=True,
        **server.settings(jobs),
    )
    yield url, jobs
    demo.close()


def fetch(url: str) -> tuple[int, str]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_the_server_serves_its_own_files_and_no_others(address):
    url, jobs = address
    assert fetch(f"{url}gradio_api/file={jobs}/clip.txt") == (200, "here")
    for path in ("/etc/passwd", f"{jobs}/../../etc/passwd", str(Path(__file__).resolve())):
        assert fetch(f"{url}gradio_api/file={path}")[0] in (403, 404)


def test_the_page_calls_nobody_else(address):
    url, _ = address
    status, page = fetch(url)
    assert status == 200
    for word in ("googleapis", "gstatic", "cdnjs", "api.gradio.app"):
        assert word not in page
    config = json.loads(fetch(f"{url}config")[1])
    assert config["analytics_enabled"] is False


def test_stored_examples_are_whole_and_small():
    stored = examples.stored()
    assert set(stored) == set(examples.PAIRS)
    for name, record in stored.items():
        folder = examples.FOLDER / name
        files = [record["both"], *(record[s]["clip"] for s in stage.SIDES)]
        assert all((folder / file).is_file() for file in files)
        assert 'class="heat"' in views.results(record, "base")
    size = sum(p.stat().st_size for p in examples.FOLDER.rglob("*") if p.is_file())
    assert size <= 1.5 * 2**20


def test_an_unknown_example_is_named(studio):
    with pytest.raises(ValueError, match="no example 'zebra'"):
        examples.make(studio, ["zebra"])


def test_the_command_line(capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--help"])
    assert stop.value.code == 0 and "127.0.0.1" in capsys.readouterr().out
    for bad in (["--queue", "0"], ["--device", "cuda:99"], ["--dtype", "int3"]):
        with pytest.raises(SystemExit) as stop:
            launch.main(bad)
        assert stop.value.code == 2
    options = launch.parser().parse_args(["--public", "--model", "a/b", "--queue", "3"])
    assert isinstance(options, argparse.Namespace)
    bounds = launch.limits(options)
    assert bounds.public and bounds.models == ("a/b",) and bounds.queue == 3
    assert launch.parser().parse_args([]).host == "127.0.0.1"
