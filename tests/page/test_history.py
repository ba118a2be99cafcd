"""What stays of a run: history, pairs, links, presets, records, reports."""

import json
import urllib.request

import pytest
from tiny import saved_lora
from visits import AFRESH, DONE, VIDEOS, again, finished, generate, settings

pytestmark = pytest.mark.browser


@pytest.fixture
def run(page):
    """A page with one finished run."""
    finished(page)
    return page


def test_runs_are_shown_again_and_any_two_clips_make_a_pair(run):
    page = run
    generate(page, seed="5", **{"right-method": "pooled"})
    page.until(AFRESH)
    page.until("return document.querySelectorAll('#history li').length == 2")
    page.until(DONE)
    page.js("const s = document.querySelectorAll('#pair select'); s[0].value = s[1].value")
    page.click("#pair button")
    page.until("return document.querySelector('.headline').textContent.includes('identical')")
    page.click("#history li button")
    page.until("return document.querySelector('#right-method').value == 'shared'")
    assert page.js("return document.querySelector('#seed').value") == ""


def test_a_link_holds_the_settings(page):
    settings(page, seed="41", negative="fog & rain")
    page.click("#link")
    page.until("return document.querySelector('#link').textContent == 'It is the address'")
    link = page.js("return location.href")
    assert "seed=41" in link
    page.js("localStorage.clear()")
    page.driver.get("about:blank")
    page.driver.get(link)
    page.until("return document.querySelector('#seed').value == '41'")
    assert page.js("return document.querySelector('#negative').value") == "fog & rain"


def saved(page, name, folder):
    """A file that the page offers, fetched."""
    address = page.js(f"return document.querySelector('a[download=\"{name}\"]').href")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    (folder / name).write_bytes(opener.open(address).read())
    return str(folder / name)


def opened(page, path, **changed):
    """A preset opened on the right, with a small clip."""
    page.keys("#open", str(path))
    page.until("return document.querySelector('#right-method').value.startsWith('opened:')")
    method = page.js("return document.querySelector('#right-method').value")
    settings(page, **{"right-method": method, **changed})


@pytest.fixture
def preset(tmp_path):
    """A preset's file."""
    config = {"method": {"name": "topk", "keep": 0.125, "block_q": 64}, "min_tokens": 0}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    return tmp_path / "mine.json"


LABEL = "figure.right .label"


def test_a_preset_is_opened_and_run(page, preset):
    opened(page, preset)
    page.click("#go")
    page.until(DONE)
    assert page.text(LABEL) == "topk, keep 0.125"


def test_a_preset_is_sent_as_it_is_written(page, desk, tmp_path):
    """JavaScript would make 1 of 1.0: every step in place of every run."""
    text = json.dumps({"method": {"name": "shared", "period": 1.0}})
    (tmp_path / "every.json").write_text(text)
    opened(page, tmp_path / "every.json")
    token = page.js("return document.querySelector('#right-method').value").partition(":")[2]
    assert desk.opened("preset", token).read_text() == text


def test_a_preset_runs_compiled_and_is_stock_afterwards(page, preset, pipe):
    opened(page, preset)
    page.click("#right-compile")
    page.click("#go")
    page.until(DONE, 240)
    assert page.text(LABEL) == "topk, keep 0.125, compiled"
    assert "Boost(compile=True" in page.text("#results pre")
    assert page.text("figure.left .label") == "dense"
    page.click("#right-compile")
    again(page)
    assert page.text(LABEL) == "topk, keep 0.125"
    assert not any(hasattr(block, "_orig_mod") for block in pipe.transformer.blocks)


def test_a_preset_runs_with_a_lora_which_is_gone_afterwards(page, preset, pipe, tmp_path):
    closeness = "return document.querySelector('[aria-labelledby=near] table').innerText"
    opened(page, preset, **{"right-lora": str(tmp_path / "none")})
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert "There is no LoRA at" in page.text("#note")
    page.fill("#right-lora", "")
    page.click("#go")
    page.until(DONE)
    without = page.js(closeness)
    page.fill("#right-lora", str(saved_lora(tmp_path / "lora")))
    again(page)
    assert page.text(LABEL) == "topk, keep 0.125, LoRA" and page.js(closeness) != without
    record = saved(page, "comparison.json", tmp_path)
    page.click("#reset")
    page.keys("#open", record)  # a record brings the LoRA with it
    page.until("return document.querySelector('#right-lora').value")
    page.fill("#right-lora", "")
    again(page)
    assert page.text(LABEL) == "topk, keep 0.125" and page.js(closeness) == without
    assert not getattr(pipe.transformer, "peft_config", None)


def test_a_lora_with_compiled_blocks_is_refused_at_its_side(page, preset, tmp_path):
    opened(page, preset, **{"right-lora": str(tmp_path)})
    page.click("#right-compile")
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert "fuse it first" in page.text("#note")
    assert page.js("return document.activeElement.id") == "right-method"


def test_records_are_opened_and_a_report_is_one_file(run, tmp_path):
    page = run
    report, record = (saved(page, name, tmp_path) for name in ("report.html", "comparison.json"))
    page.fill("#seed", "1")
    page.keys("#open", record)
    page.until("return document.querySelector('#seed').value == ''")
    page.driver.get(f"file://{report}")
    page.until(VIDEOS + "return a.readyState > 1 && b.readyState > 1")
    assert page.js("return document.querySelectorAll('.map .cell').length") == 4 * 2
    page.click("[data-view=wipe]")
    page.keys(".cut", "\ue014")
    cut = "return parseFloat(document.querySelector('.stage').style.getPropertyValue('--cut'))"
    assert page.js(cut) > 50
    page.open()
