"""The real page in headless Chromium: `make test-browser`. Needs chromium, its driver, selenium.

A tiny random model stands behind it, so that a generation takes a second. Each fault of the earlier
page has its test, most at the width of a desktop and of a phone.
"""

import json
import re
import time
import urllib.request

import pytest
import torch
from asks import DEFAULTS
from browser import DESKTOP, PHONE, Tab, axe, served
from tiny import tiny_wan

from dit_accel.app import server
from dit_accel.app.ask import Limits
from dit_accel.app.catalog import card
from dit_accel.app.desk import Desk
from dit_accel.app.studio import Studio
from dit_accel.generation.loading import EMBEDDED

pytestmark = pytest.mark.browser

SMALL = {"steps": "4", "size": "128x128", "frames": "9", "right-min_tokens": "0"}
LONG = 1000


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    torch.set_num_threads(1)
    limits = Limits(steps=LONG, places=2, queue=3)
    studio, pipe = Studio(lambda name: (pipe, DEFAULTS)), tiny_wan()
    studio.warm()
    return Desk(studio, tmp_path_factory.mktemp("jobs"), limits, grace=2)


@pytest.fixture(scope="module")
def url(desk):
    with served(server.build(desk)) as address:
        yield address


@pytest.fixture(scope="module")
def browsers(url, tmp_path_factory):
    """One browser for each width: starting one takes longer than most tests."""
    found = {s: Tab(url, tmp_path_factory.mktemp("profile"), s) for s in (DESKTOP, PHONE)}
    yield found
    for tab in found.values():
        tab.close()


def fresh(tab: Tab, rest: str = "") -> Tab:
    """As a visitor who comes for the first time."""
    tab.driver.get(tab.url + "static/page.css")
    tab.js("localStorage.clear(); sessionStorage.clear()")
    tab.open(rest)
    return tab


@pytest.fixture
def page(browsers):
    yield fresh(browsers[DESKTOP])
    quiet(browsers[DESKTOP])


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def any_page(browsers, request):
    yield fresh(browsers[request.param])
    quiet(browsers[request.param])


def quiet(tab: Tab) -> None:
    """Nothing of this test runs on."""
    tab.js("document.querySelector('#stop:not(:disabled)')?.click()")
    tab.until("return document.querySelector('#stop').disabled", 20)


def prompt() -> str:
    """One that the embedded model's words allow: the page checks it by them."""
    return card(None).words.examples(1)[0]


def settings(page: Tab, **changed: str) -> None:
    """A small clip with the settings of a page that was just opened, but for some."""
    page.click("#reset")
    page.fill("#prompt", prompt())
    for name, value in {**SMALL, **changed}.items():
        page.fill(f"#{name}", value)


def generate(page: Tab, **changed: str) -> None:
    settings(page, **changed)
    page.click("#go")


DONE = (
    "return document.querySelectorAll('figure.clip').length == 2 &&"
    " [...document.querySelectorAll('video')].every(v => v.src.includes('/jobs/')) &&"
    " !document.querySelector('#go').disabled && document.querySelector('.headline') !== null"
)
VIDEOS = "const [a, b] = document.querySelectorAll('video');"
DENOISING = "return document.querySelector('.left .state').textContent.includes('denoising')"


def test_generate_play_wipe_and_difference(page):
    generate(page)
    page.until(DONE)
    page.until(VIDEOS + "return a.currentTime > 0 && !a.paused && !b.paused")
    apart = [page.js(VIDEOS + "return Math.abs(a.currentTime - b.currentTime)") for _ in range(5)]
    assert sorted(apart)[2] < 2 / DEFAULTS.fps
    page.click("[data-view=wipe]")
    page.fill(".cut", "20")
    cut = "return document.querySelector('.stage').style.getPropertyValue('--cut')"
    assert page.js(cut) == "20%"
    page.click("[data-view=apart]")
    page.fill(".at", "4")
    page.until(VIDEOS + "return a.paused && b.paused && a.currentTime == b.currentTime")
    page.until("return document.querySelector('.where').textContent == '5 / 9'")
    page.fill(".gain input", "12")
    gain = "return document.querySelector('.apart-of canvas').style.filter"
    assert page.js(gain) == "brightness(12)"
    dark = (
        "const c = document.querySelector('.apart-of canvas');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return Math.max(...d.filter((x, i) => i % 4 < 3))"
    )
    assert page.js(dark) < 128  # of equal frames of nearly equal clips
    assert page.js("return document.querySelectorAll('.map .cell').length") == 4 * 2
    links = "return [...document.querySelectorAll('.downloads a')].map(a => a.href)"
    for link in page.js(links):
        status = page.js("return fetch(arguments[0]).then(r => r.status)", link)
        assert status in (200, 206)  # a clip the player has may come in part
    assert page.severe() == []
    sent = [m for m in page.network() if m["method"] == "Network.requestWillBeSent"]
    urls = {m["params"]["request"]["url"] for m in sent}
    assert {u for u in urls if u.startswith("http") and not u.startswith(page.url)} == set()
    assert not any("/tmp" in u for u in urls)  # S6: no path of the server


def test_a_stored_example_plays_at_first_sight_and_another_on_a_click(any_page):
    page = any_page
    page.until(VIDEOS + "return a.currentTime > 0 && !a.paused && !b.paused")
    first = page.js(VIDEOS + "return a.src")
    page.click("#chips button:nth-of-type(2)")
    page.until(VIDEOS + f"return a.src != {json.dumps(first)} && !a.paused && !b.paused")
    chip = page.text("#chips button:nth-of-type(2)")
    assert page.js("return document.querySelector('#prompt').value") == chip
    assert chip in page.text("#results")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("size", "5000x256", "Width is a whole number from 16 to 1280, not 5000."),
        ("steps", "5000", "Steps is a whole number from 1 to 1000, not 5000."),
        ("frames", "many", "Frames is a whole number, not 'many'."),
        ("guidance", "-3", "Guidance is a number from 0 to 100, not -3.0."),
        ("right-keep", "7", "keep is the share of key blocks kept"),
        ("prompt", "   ", "The prompt is empty: say what to show."),
    ],
)
def test_p1_what_is_out_of_range_is_said_at_its_field(any_page, field, value, words):
    page = any_page
    settings(page)
    page.fill(f"#{field}", value)
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert words in page.text("#note")
    focus = page.js("return document.activeElement.id")
    assert focus in (field, "right-method") and page.js("return document.activeElement.ariaInvalid")
    assert not page.js("return document.querySelector('#go').disabled")


def test_p2_a_chip_sets_what_its_clips_were_made_with(any_page):
    page = any_page
    for number in range(1, 1 + page.js("return document.querySelectorAll('#chips button').length")):
        page.click(f"#chips button:nth-of-type({number})")
        page.until(
            f"return document.querySelector('#chips button:nth-of-type({number})').ariaPressed"
            " == 'true'"
        )
        shown = page.text("figure.right .label")
        method, keep = re.match(r"([a-z]+)[^,]*, keep ([\d.]+)", shown).groups()
        assert page.js("return document.querySelector('#right-method').value") == method
        box = "const k = document.querySelector('#right-keep'); return k.value || k.placeholder"
        assert float(page.js(box)) == float(keep)


def test_p3_a_clip_that_is_too_short_says_so_and_has_the_button_that_mends_it(any_page):
    page = any_page
    generate(page, **{"right-min_tokens": ""})
    page.until("return document.querySelector('#cost button')")
    assert "Nothing will be skipped on the right" in page.text("#cost")
    page.until(DONE)
    assert page.text(".headline") == "no attention skipped, identical"
    assert "the clip is too short" in page.text("#results")
    page.click("#results .fix button")
    page.until("return !document.querySelector('.headline')")
    page.until(DONE)
    assert "faster" in page.text(".headline") or "slower" in page.text(".headline")
    assert not page.js("return document.querySelector('#results .fix')")


def test_p4_work_is_bounded_and_told_before(page):
    page.fill("#prompt", prompt())
    settings(page)
    page.until("return document.querySelector('#cost').textContent.includes('192 tokens × 4')")
    assert re.search(r"about \d+ s on this CPU", page.text("#cost"))
    settings(page, size="1280x1280", frames="129", steps="100")
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert "211,200 tokens × 100 steps = 21,120,000; this page takes 500,000" in page.text("#note")


def test_p4_the_run_of_a_closed_tab_ends(page, desk):
    generate(page, steps=str(LONG))
    page.until(DENOISING)
    job = desk.job(page.js("return JSON.parse(sessionStorage.getItem('dit_accel.job'))"))
    page.driver.get("about:blank")
    end = time.monotonic() + 20
    while job.state == "running" and time.monotonic() < end:
        time.sleep(0.1)
    assert job.state == "cancelled"
    page.open()


def test_p5_what_it_can_draw_and_a_word_it_does_not_know(any_page):
    page = any_page
    draws = card(None).facts()["draws"]
    page.click("#draws summary")
    assert page.js("return document.querySelectorAll('#names button').length") == len(draws)
    name = draws[len(draws) // 2][0]
    page.fill("#find", name)
    names = page.js("return [...document.querySelectorAll('#names button')].map(b => b.innerText)")
    assert name in names and len(names) < len(draws)
    page.fill("#prompt", draws[0][1])
    page.js(
        "[...document.querySelectorAll('#names button')].find(b => b.innerText == arguments[0])"
        ".click()",
        name,
    )
    assert name in page.js("return document.querySelector('#prompt').value")
    page.until("return document.querySelector('#trouble').textContent == ''")
    page.fill("#prompt", "a zeppelin on a blue background")
    page.until("return document.querySelector('#trouble').textContent.includes('zeppelin')")


def test_p5_every_method_has_its_line_and_sla_says_what_it_needs(page):
    options = "return [...document.querySelector('#right-method').options].map(o => o.value)"
    for method in page.js(options):
        page.fill("#right-method", method)
        assert len(page.text("#right-about")) > 20
    page.fill("#right-method", "sla")
    assert "fine-tuned" in page.text("#right-about")
    assert "CPU only" in page.text("#machine")


def test_p6_a_chip_during_a_run_shows_the_example_and_the_run_goes_on(page):
    generate(page, steps="200")
    page.until(DENOISING)
    page.click("#chips button")
    page.until(VIDEOS + "return a.src.includes('examples') && b.src.includes('examples')")
    time.sleep(1)
    assert page.js(VIDEOS + "return a.src.includes('examples') && b.src.includes('examples')")
    assert page.js("return document.querySelectorAll('figure.busy').length") == 0
    page.until("return document.querySelector('#status').textContent.includes('left.')")
    page.click("#back")
    assert page.js("return document.querySelectorAll('video[src]').length") < 2
    page.click("#chips button")
    page.until(VIDEOS + "return a.src.includes('examples') && b.src.includes('examples')")
    page.until("return document.querySelector('#history ol button')")
    assert page.js(VIDEOS + "return a.src.includes('examples')")
    page.click("#history ol button")
    page.until(DONE)


def test_p6_a_reload_keeps_settings_and_finds_the_run_again(any_page):
    page = any_page
    generate(page, steps="120", seed="77", negative="fog")
    page.until(DENOISING)
    page.reload()
    assert page.js("return document.querySelector('#seed').value") == "77"
    assert page.js("return document.querySelector('#negative').value") == "fog"
    page.until(DENOISING, 10)
    assert page.js("return document.querySelector('#go').disabled")
    page.until(DONE, 120)
    page.reload()
    page.until(DONE, 10)


def test_p6_a_lost_server_is_said(browsers, desk, tmp_path):
    other = Desk(desk.studio, tmp_path, Limits(steps=LONG))
    tab = Tab("", tmp_path / "profile")
    try:
        with served(server.build(other)) as address:
            tab.url = address
            tab.open()
            generate(tab, steps=str(LONG))
            tab.until(DENOISING)
        tab.until("return document.querySelector('#status').textContent.includes('lost')", 20)
        port = int(address.rsplit(":", 1)[1].strip("/"))
        with served(server.build(Desk(desk.studio, tmp_path / "new")), port):
            said = "return document.querySelector('#note').textContent.includes('restarted')"
            tab.until(said, 20)
            assert not tab.js("return document.querySelector('#go').disabled")
            assert tab.text(".left .state") == "lost"
    finally:
        tab.close()


def test_p7_a_phone_shows_the_stage_after_a_click(browsers):
    page = fresh(browsers[PHONE])
    assert page.js("return document.documentElement.scrollWidth") <= 390
    generate(page, steps="40")
    page.until(DENOISING)
    time.sleep(1)
    top = page.js("return document.querySelector('#player').getBoundingClientRect().top")
    assert 0 <= top < 500
    page.until(DONE)
    assert page.js("return document.documentElement.scrollWidth") <= 390
    quiet(page)


def test_p8_a_mistyped_model_is_said_and_the_next_run_goes(page):
    generate(page, model="/no/such/folder")
    page.until("return document.querySelector('#note').textContent")
    generate(page)
    page.until(DONE)


def test_p9_words_and_map_agree(page):
    generate(page)
    page.until(DONE)
    titles = page.js("return [...document.querySelectorAll('.map title')].map(t => t.textContent)")
    full = {t.split(",")[0] for t in titles if "all blocks" in t}
    words = re.search(r"All blocks were read in (\d+) of (\d+) steps", page.text("#results"))
    assert (len(full), 4) == tuple(map(int, words.groups()))


def test_p10_waiters_see_their_place_and_time(page, url, tmp_path):
    other = Tab(url, tmp_path / "other", PHONE)
    try:
        other.open()
        generate(other, steps=str(LONG))
        other.until(DENOISING)
        other.until("return /About .* left\\./.test(document.querySelector('#status').textContent)")
        generate(page)
        page.until("return document.querySelector('#status').textContent.includes('before yours')")
        assert re.search(r"1 run is before yours: your turn in about \d+", page.text("#status"))
        other.click("#stop")
        page.until(DONE)
        src = page.js(VIDEOS + "return a.src")
        generate(other)
        other.until(DONE)
        assert src != other.js(VIDEOS + "return a.src")
    finally:
        other.close()


def test_p11_wipe_and_difference_say_which_side_is_which(any_page):
    page = any_page
    page.click("[data-view=wipe]")
    tags = "return [...document.querySelectorAll('.tag')].map(t => [t.offsetWidth, t.textContent])"
    (left, left_words), (right, right_words) = page.js(tags)
    assert left and right and left_words.startswith("left") and right_words.startswith("right")
    grip = "return document.querySelector('.grip').getBoundingClientRect().width"
    assert page.js(grip) >= 24
    page.keys(".cut", "\ue014", "\ue014")  # the right arrow
    cut = "return parseFloat(document.querySelector('.stage').style.getPropertyValue('--cut'))"
    assert page.js(cut) > 50
    page.click("[data-view=apart]")
    assert all(width for width, _ in page.js(tags))


def test_the_attention_view_draws_what_a_place_reads(any_page):
    page = any_page
    generate(page)
    page.until(DONE)
    page.click("#look")
    page.until("return document.querySelector('.look') !== null")
    words = page.text("#read")
    assert "reads 1.0 of 3 key blocks in each head" in words
    before = page.js("return document.querySelector('.look').toDataURL()")
    page.keys(".look", *["\ue015"] * 4)  # down
    assert before == page.js(
        "return document.querySelector('.look').toDataURL()"
    )  # 64 tokens a block
    page.click(".play")
    page.until("return Number(document.querySelector('.at').value) > 5")
    page.click(".play")
    page.click("#look")
    assert page.js("return document.querySelector('.look') === null")


def test_keys_play_step_zoom_and_generate(page):
    page.until(VIDEOS + "return a.currentTime > 0 && !a.paused")
    page.js("document.querySelector('.stage').focus()")
    page.keys(".stage", " ")
    page.until(VIDEOS + "return a.paused && b.paused")
    before = page.js("return Number(document.querySelector('.at').value)")
    page.keys(".stage", "\ue014")
    last = page.js("return Number(document.querySelector('.at').max)")
    page.until(f"return Number(document.querySelector('.at').value) == {(before + 1) % (last + 1)}")
    page.keys(".stage", "+", "+")
    moved = "return [...document.querySelectorAll('video')].map(v => getComputedStyle(v).transform)"
    one, other = page.js(moved)
    assert one == other and one.startswith("matrix(2.25")
    page.keys(".stage", "0")
    assert page.js(moved)[0].startswith("matrix(1,")
    page.fill("#prompt", prompt())
    settings(page)
    page.keys("#prompt", "\ue009", "\ue007")  # Ctrl + Enter
    page.until(DONE)


def test_cancel_then_generate_again(any_page):
    page = any_page
    generate(page, steps=str(LONG))
    page.until(DENOISING)
    began = time.monotonic()
    page.click("#stop")
    page.until("return document.querySelector('.left .state').textContent == 'cancelled'")
    assert time.monotonic() - began < 5
    generate(page)
    page.until(DONE)


def test_what_a_visitor_types_is_shown_and_never_run(page):
    nasty = "<img src=x onerror=\"document.title='run'\"> {{ 7*7 }} ${7*7} <b>bold</b>"
    generate(page, negative=nasty)
    page.until(DONE)
    page.fill("#prompt", nasty)
    page.until("return document.querySelector('#trouble').textContent.includes('img')")
    page.click("#go")
    page.until(DONE)
    page.js("location.hash = arguments[0]", "prompt=" + nasty + "&__proto__.x=1")
    page.reload()
    assert page.js("return document.title") != "run" and page.js("return ({}).x") is None
    assert page.severe() == []


def test_history_pairs_links_presets_and_report(page, tmp_path):
    generate(page)
    page.until(DONE)
    generate(page, seed="5", **{"right-method": "pooled"})
    page.until("return !document.querySelector('.headline')")
    page.until("return document.querySelectorAll('#history li').length == 2")
    page.until(DONE)
    page.js("const s = document.querySelectorAll('#pair select'); s[0].value = s[1].value")
    page.click("#pair button")
    page.until("return document.querySelector('.headline').textContent.includes('identical')")
    page.click("#history li button")
    page.until("return document.querySelector('#right-method').value == 'shared'")
    page.fill("#seed", "41")
    page.click("#link")
    link = page.js("return location.href")
    assert "seed=41" in link
    page.js("localStorage.clear()")
    page.driver.get("about:blank")
    page.driver.get(link)
    page.until("return document.querySelector('#seed').value == '41'")
    preset = {"method": {"name": "topk", "keep": 0.125, "block_q": 64}, "min_tokens": 0}
    (tmp_path / "mine.json").write_text(json.dumps(preset))
    page.keys("#open", str(tmp_path / "mine.json"))
    page.until("return document.querySelector('#right-method').value.startsWith('opened:')")
    opened = page.js("return document.querySelector('#right-method').value")
    generate(page, seed="41", **{"right-method": opened})
    page.until("return !document.querySelector('.headline')")
    page.until(DONE)
    assert page.text("figure.right .label") == "topk, keep 0.125"
    report = page.js("return document.querySelector('a[download=\"report.html\"]').href")
    record = page.js("return document.querySelector('a[download=\"comparison.json\"]').href")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for name, address in (("report.html", report), ("comparison.json", record)):
        (tmp_path / name).write_bytes(opener.open(address).read())
    page.fill("#seed", "1")
    page.keys("#open", str(tmp_path / "comparison.json"))
    page.until("return document.querySelector('#seed').value == '41'")
    page.driver.get(f"file://{tmp_path / 'report.html'}")
    page.until(VIDEOS + "return a.readyState > 1 && b.readyState > 1")
    assert page.js("return document.querySelectorAll('.map .cell').length") == 4 * 2
    page.click("[data-view=wipe]")
    page.keys(".cut", "\ue014")
    cut = "return parseFloat(document.querySelector('.stage').style.getPropertyValue('--cut'))"
    assert page.js(cut) > 50
    page.open()


def test_a_first_picture_is_taken_and_removed(page, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    (tmp_path / "no.png").write_text("no picture")
    page.js("for (const d of document.querySelectorAll('details')) d.open = true")
    page.keys("#image", str(tmp_path / "no.png"))
    page.until("return document.querySelector('#note').textContent.includes('no picture')")
    settings(page)
    page.keys("#image", str(tmp_path / "red.png"))
    page.until("return document.querySelector('[name=image]').value")
    page.click("#go")
    page.until("return document.querySelector('#note').textContent")
    assert "takes no image" in page.text("#note")
    page.click("[data-for=image]")
    assert page.js("return document.querySelector('[name=image]').value") == ""


def test_a_random_seed(page):
    page.click("#dice")
    assert page.js("return Number(document.querySelector('#seed').value)") > 0


AXE = axe()


@pytest.mark.skipif(AXE is None, reason="axe-core is not here: npm install axe-core")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_p12_axe_finds_nothing(any_page, dark):
    page = any_page
    page.dark(dark)
    page.open()
    for state in ("example", "wipe", "done", "wrong"):
        if state == "wipe":
            page.click("[data-view=wipe]")
            page.js("for (const d of document.querySelectorAll('details')) d.open = true")
        if state == "done":
            page.click("[data-view='']")
            generate(page)
            page.until(DONE)
        if state == "wrong":
            page.fill("#steps", "0")
            page.click("#go")
            page.until("return document.querySelector('#note').textContent")
        page.cdp("Runtime.evaluate", expression=AXE.read_text("utf-8"))
        page.driver.set_script_timeout(60)
        found = page.driver.execute_async_script(
            "axe.run(document, {resultTypes: ['violations']}).then(arguments[0])"
        )
        said = [(v["impact"], v["id"], v["nodes"][0]["html"][:120]) for v in found["violations"]]
        assert said == [], state
    page.dark(False)


def test_p12_targets_are_large_enough_and_progress_is_announced(any_page):
    page = any_page
    small = page.js(
        "return [...document.querySelectorAll('button, select, summary, input:not([type=radio])"
        ":not([type=checkbox]):not([type=file]), .levels label, .switch label')]"
        ".filter(x => x.offsetParent && x.getBoundingClientRect().height < 24)"
        ".map(x => x.outerHTML.slice(0, 80))"
    )
    assert small == []
    live = page.js("return ['#said', '#note', '#cost'].map(q => document.querySelector(q).role)")
    assert live == ["status", "alert", "status"]
    generate(page)
    page.until(DONE)
    assert page.js("return document.querySelector('#said').textContent") == "Both clips are done."
    page.keys("#prompt", "\ue004")
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_the_embedded_model_is_the_one_whose_words_are_shown():
    assert (EMBEDDED / "training.json").is_file()
