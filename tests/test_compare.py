"""compare: files, figures that agree, a recipe that works, a page that stands alone."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import saved_tiny_wan, tiny_flux
from typed import NASTY, Reader, shown_as_text

import dit_accel
from dit_accel.config import AccelConfig
from dit_accel.generation import compare, comparison, loading
from dit_accel.generation.boost import Boost
from dit_accel.generation.loading import Defaults, load_pipeline
from dit_accel.generation.recipe import _shortest
from dit_accel.generation.request import Request, arguments, granularity, unknown_words
from dit_accel.generation.run import generate
from dit_accel.media import metadata, video
from dit_accel.pages import charts, figures
from dit_accel.pages import comparison as html
from dit_accel.samplers import install

ROOT = Path(__file__).parents[1]
GENERATION = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "fps": 8}
REQUEST = Request("rocket on a blue background", seed=7)
SPARSE = AccelConfig(dit_accel.TopK(keep=0.5), dit_accel.Schedule(warmup=1), min_tokens=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_tiny_wan(tmp_path_factory.mktemp("wan"), GENERATION)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_pipeline(folder, device="cpu")


@pytest.fixture(scope="module")
def done(loaded, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "deep"
    return compare(*loaded, REQUEST, SPARSE, out, model=str(folder), command="dit-accel <x>")


def test_generate_is_the_stock_call(loaded):
    pipe, defaults = loaded
    seen = []
    result = generate(pipe, defaults, REQUEST, lambda *event: seen.append(event))
    values = {k: v for k, v in GENERATION.items() if k != "fps"}
    stock = pipe(REQUEST.prompt, **values, generator=torch.Generator().manual_seed(7)).frames[0]
    assert np.array_equal(result.frames, (stock * 255).round().astype(np.uint8))
    assert len(result.times.steps) == 3
    assert sum(result.times.steps) == pytest.approx(result.times.denoise)
    parts = result.times.encode + result.times.denoise + result.times.decode
    assert parts == pytest.approx(result.times.total)
    assert [e for e in seen if e[0] == "denoise"] == [("denoise", i, 3) for i in range(4)]
    assert seen[-1] == ("decode", 3, 3)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks


def test_pictures_too():
    pipe = tiny_flux()
    defaults = Defaults.from_pipeline(pipe)
    result = generate(pipe, defaults, Request("a cat", height=64, width=64, steps=2))
    assert result.frames.shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="FluxPipeline takes no frames"):
        arguments(pipe, defaults, Request("a cat", frames=5))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 0}, "steps lies from 1 to 1000, not 0"),
        ({"height": 10}, "height lies from 16 to 8192"),
        ({"width": 100000}, "width lies from 16 to 8192"),
        ({"frames": 0}, "frames lies from 1"),
        ({"seed": -1}, "seed lies from 0 to"),
        ({"guidance": -2}, "guidance lies from 0"),
        ({"prompt": "  "}, "prompt is empty"),
    ],
)
def test_requests_no_pipeline_could_take(wrong, says):
    with pytest.raises(ValueError, match=says):
        Request(**{"prompt": "a cat", **wrong})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"height": 72}, "height is a multiple of 16 for this model, not 72: try 64"),
        ({"frames": 10}, "frames is a multiple of 4 plus one for this model, not 10: try 9"),
        ({"image": "x"}, "WanPipeline takes no image"),
    ],
)
def test_requests_this_pipeline_cannot_take(loaded, wrong, says):
    with pytest.raises(ValueError, match=says):
        generate(*loaded, Request("a cat", **wrong))


def test_what_the_pipeline_needs(loaded):
    assert granularity(loaded[0]) == (16, 4)
    assert granularity(tiny_flux()) == (4, 1)
    assert unknown_words(loaded[0], "a rocket on a zebra") == ["zebra"]


def test_every_file_is_there(done):
    assert sorted(path.name for path in done.files["page"].parent.iterdir()) == [
        "accelerated.mp4",
        "contact_sheet.png",
        "dense.mp4",
        "report.html",
        "report.json",
        "side_by_side.mp4",
    ]
    assert video.read(done.files["dense"]).shape == (9, 64, 64, 3)
    assert json.loads(done.files["report"].read_text()) == json.loads(json.dumps(done.data))


def test_the_figures_agree(done):
    data = done.data
    times, speedup = data["times"], data["speedup"]
    assert speedup["denoise"] == times["dense"]["denoise"] / times["accelerated"]["denoise"]
    assert len(times["dense"]["steps"]) == len(times["accelerated"]["steps"]) == 3
    assert len(data["quality"]["psnr"]) == len(data["quality"]["ssim"]) == 9
    assert 0 < data["kept"] <= 1
    assert data["attention"]["fallbacks"] == {"warm-up step": 4}
    assert sum(layer["sparse"] for layer in data["attention"]["layers"]) == 8
    assert data["machine"]["torch"] == torch.__version__


def test_the_pipeline_is_stock_afterwards(loaded, tmp_path):
    pipe, defaults = loaded
    before = generate(pipe, defaults, REQUEST).frames
    dit_accel.accelerate(pipe, SPARSE)
    compare(pipe, defaults, REQUEST, SPARSE, tmp_path)
    assert np.array_equal(generate(pipe, defaults, REQUEST).frames, before)


def test_dense_is_identical(loaded, tmp_path):
    done = compare(*loaded, REQUEST, AccelConfig(dit_accel.Dense()), tmp_path)
    assert done.data["quality"]["psnr_mean"] == 100
    assert done.data["quality"]["latent_error"] == 0
    assert html.headline(done.data) == "no attention skipped, identical"


def test_the_recipe_makes_the_accelerated_clip(loaded, done):
    pipe, defaults = loaded
    space = {}
    exec(done.data["python"], space)
    made = (space["output"].frames[0] * 255).round().astype(np.uint8)
    with dit_accel.accelerated(pipe, SPARSE):
        assert np.array_equal(made, generate(pipe, defaults, REQUEST).frames)
    assert "dit_accel.TopK(keep=0.5)" in done.data["python"]
    assert "schedule=dit_accel.Schedule(warmup=1)" in done.data["python"]


def test_the_recipe_of_a_branch_is_python_that_runs():
    config = AccelConfig(dit_accel.SLA(0.2, branch="decay"))
    text = _shortest(config)
    assert eval(text, {"dit_accel": dit_accel}) == config.method and "decay" in text


def test_the_dense_clip_says_nothing_of_what_the_other_ran_with(loaded, tmp_path):
    boost = Boost(step_cache=5.0)
    files = compare(*loaded, REQUEST, SPARSE, tmp_path, boost=boost).files
    said = {name: metadata.read(files[name])["boost"] for name in ("dense", "accelerated")}
    assert said["dense"] is None and said["accelerated"]["step_cache"] == 5.0


def test_a_pipeline_of_a_sampler_with_so_many_steps_and_no_others(loaded, tmp_path):
    """As FastWan's checkpoint leaves it: the warm-up is no run of one step."""
    pipe, defaults = loaded
    undo = install(pipe, "dmd:1000,757,522")
    try:
        done = compare(pipe, defaults, replace(REQUEST, steps=3), SPARSE, tmp_path)
    finally:
        undo()
    assert len(done.data["times"]["dense"]["steps"]) == 3


def test_the_recipe_of_the_embedded_model_names_no_folder(loaded, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "EMBEDDED", folder)
    config = AccelConfig(dit_accel.Dense())
    done = compare(*loaded, REQUEST, config, tmp_path, model=str(folder))
    assert "WanPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32)" in done.data["python"]
    assert str(folder) not in (tmp_path / "report.json").read_text()


def test_a_bad_request_writes_nothing(loaded, tmp_path):
    with pytest.raises(ValueError, match="multiple of 16"):
        compare(*loaded, Request("x", height=40), SPARSE, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_leaves_the_pipeline_stock(loaded, tmp_path, monkeypatch):
    pipe, defaults = loaded
    forward = pipe.vae.decode

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(pipe.vae, "decode", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        compare(pipe, defaults, REQUEST, SPARSE, tmp_path)
    monkeypatch.setattr(pipe.vae, "decode", forward)
    assert list(tmp_path.iterdir()) == []
    assert not pipe.transformer._forward_hooks


@pytest.mark.parametrize("guide", ["generate.md", "compare.md"])
def test_the_guides_python_runs(folder, tmp_path, monkeypatch, guide):
    monkeypatch.setattr(loading, "EMBEDDED", folder)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "start" / guide).read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(code, {})
    assert list(tmp_path.rglob("*.mp4"))


class Checker(HTMLParser):
    """Collects what a page links to and checks that its elements close."""

    VOID = {"meta", "input", "img", "line", "circle", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.links, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(done):
    text = done.files["page"].read_text()
    checker = Checker(text)
    assert checker.open == []
    assert len(checker.links) == 3
    assert all(link.startswith("data:") for link in checker.links)
    assert "dit-accel &lt;x&gt;" in text
    assert html.headline(done.data) in text
    assert text.count("<polyline") == 3


def test_what_is_typed_is_shown_and_never_run(done):
    folder, pages = done.files["page"].parent, []
    for words in (NASTY, "a cat"):
        typed = dict.fromkeys(("prompt", "command", "python", "model", "method"), words)
        attention = {**done.data["attention"], "fallbacks": {words: 1}}
        pages.append(html.page({**done.data, **typed, "attention": attention}, folder))
    assert shown_as_text(*pages)
    # title, prompt, caption, reason, Python, command, settings
    assert sum(NASTY in text for text in Reader(pages[0]).shown) == 7


def test_large_clips_stay_beside_the_page(done, monkeypatch):
    monkeypatch.setattr(html, "EMBED_BELOW", 1)
    text = html.page(done.data, done.files["page"].parent)
    assert Checker(text).links == ["dense.mp4", "accelerated.mp4", "contact_sheet.png"]


def test_a_picture_gets_a_page_without_player(tmp_path):
    pipe = tiny_flux()
    request = Request("a cat", height=64, width=64, steps=2)
    done = compare(pipe, Defaults.from_pipeline(pipe), request, SPARSE, tmp_path)
    assert done.files["dense"].name == "dense.png"
    text = done.files["page"].read_text()
    assert '<body class="still">' in text
    assert "<video" not in text


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0313), (17.2, 17.9), (100.0, 100.0), (0, 190)])
def test_chart_ticks_enclose_the_values(low, high):
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 6
    drawn = charts.lines({"fast": [low, high]}, "frame", "dB")
    places = [float(y) for y in re.findall(r"cy=([\d.]+)", drawn)]
    assert all(0 <= y <= charts.HEIGHT for y in places)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 ms"), (0.0059, "5.9 ms"), (0.0131, "13 ms"), (0.264, "0.26 s"), (3.61, "3.6 s")],
)
def test_seconds_have_the_digits_that_matter(value, shown):
    assert figures.seconds(value) == shown
