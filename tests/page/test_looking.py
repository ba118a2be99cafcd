"""Looking at clips: players in step, wipe, difference, attention, keys; axe-core, targets."""

import json
import re

import pytest
from asks import DEFAULTS
from browser import axe
from visits import DONE, VIDEOS, finished, prompt, settings

pytestmark = pytest.mark.browser


def test_generate_play_wipe_and_difference(page):
    finished(page)
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
    asked = [
        u for u in urls if u.startswith(page.url)
    ]  # not a picture's letters, nor another test's
    assert asked and [u for u in asked if "/tmp" in u] == []  # S6: no path of the server


def test_a_stored_example_plays_at_first_sight_and_another_on_a_click(any_page):
    page = any_page
    page.until(VIDEOS + "return a.currentTime > 0 && !a.paused && !b.paused")
    first = page.js(VIDEOS + "return a.src")
    page.click("#chips button:nth-of-type(2)")
    page.until(VIDEOS + f"return a.src != {json.dumps(first)} && !a.paused && !b.paused")
    chip = page.text("#chips button:nth-of-type(2)")
    assert page.js("return document.querySelector('#prompt').value") == chip
    assert chip in page.text("#results")


def test_p9_words_and_map_agree(page):
    finished(page)
    titles = page.js("return [...document.querySelectorAll('.map title')].map(t => t.textContent)")
    full = {t.split(",")[0] for t in titles if "all blocks" in t}
    words = re.search(r"All blocks were read in (\d+) of (\d+) steps", page.text("#results"))
    assert (len(full), 4) == tuple(map(int, words.groups()))


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
    page.rule(".wipe .tag, .apart .tag { display: none }")  # as it was: nothing says which is which
    assert not any(width for width, _ in page.js(tags))


def test_the_attention_view_draws_what_a_place_reads(any_page):
    page = any_page
    finished(page)
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


def test_the_difference_closes_the_attention_view(any_page):
    page = any_page
    finished(page)
    page.click("#look")
    page.until("return document.querySelector('.look') !== null")
    state = "const b = document.querySelector('#look'); return [b.ariaPressed, b.disabled]"
    assert page.js(state) == ["true", False]
    page.click("[data-view=apart]")
    assert page.js(state) == ["false", True]
    assert page.js("return document.querySelector('.look') === null")
    page.click("[data-view='']")
    assert page.js(state) == ["false", False]


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


AXE = axe()
needs_axe = pytest.mark.skipif(AXE is None, reason="axe-core is not here: npm install axe-core")


def violations(page):
    """(impact, rule, where) of everything that axe-core finds."""
    page.cdp("Runtime.evaluate", expression=AXE.read_text("utf-8"))
    page.driver.set_script_timeout(60)
    found = page.driver.execute_async_script(
        "axe.run(document, {resultTypes: ['violations']}).then(arguments[0])"
    )["violations"]
    return [(v["impact"], v["id"], v["nodes"][0]["html"][:120]) for v in found]


@needs_axe
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
            finished(page)
        if state == "wrong":
            page.fill("#steps", "0")
            page.click("#go")
            page.until("return document.querySelector('#note').textContent")
        assert violations(page) == [], state
    page.dark(False)


@needs_axe
def test_p12_axe_finds_what_was_wrong_before(page):
    page.rule("small, .quiet { color: #bbb !important }")
    page.js("document.querySelector('.levels').removeAttribute('aria-label')")
    page.js("document.querySelector('label[for=prompt]').remove()")
    assert {"color-contrast", "label"} <= {rule for _, rule, _ in violations(page)}


SMALL_TARGETS = (
    "return [...document.querySelectorAll('button, select, summary, input:not([type=radio])"
    ":not([type=checkbox]):not([type=file]), .levels label, .switch label')]"
    ".filter(x => x.offsetParent && x.getBoundingClientRect().height < 24)"
    ".map(x => x.outerHTML.slice(0, 80))"
)


def test_p12_targets_are_large_enough_and_progress_is_announced(any_page):
    page = any_page
    assert page.js(SMALL_TARGETS) == []
    live = page.js("return ['#said', '#note', '#cost'].map(q => document.querySelector(q).role)")
    assert live == ["status", "alert", "status"]
    finished(page)
    assert page.js("return document.querySelector('#said').textContent") == "Both clips are done."
    page.keys("#prompt", "\ue004")
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert page.js(outline) == "solid"
    page.rule(":focus-visible { outline: none !important }")  # as it was
    page.rule("summary { min-height: 0; height: 18px }")
    assert page.js(outline) == "none" and page.js(SMALL_TARGETS) != []
