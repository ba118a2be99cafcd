"""A run: followed, cancelled, found again after a reload, waited for, lost."""

import re
import time

import pytest
from browser import PHONE, Tab, served
from visits import DENOISING, DONE, LONG, VIDEOS, finished, fresh, generate, quiet

from dit_accel.app import server
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk

pytestmark = pytest.mark.browser


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
    page.js("sessionStorage.clear(); localStorage.clear()")  # without what was kept, it is lost
    page.reload()
    assert page.js("return document.querySelector('#seed').value") != "77"
    assert not page.js(DONE)


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
    where = "return document.querySelector('#player').getBoundingClientRect().top"
    assert page.js("return document.documentElement.scrollWidth") <= 390
    generate(page, steps="40")
    page.until(DENOISING)
    page.until(f"const at = (() => {{ {where} }})(); return 0 <= at && at < 500", 10)
    page.until(DONE)
    assert page.js("return document.documentElement.scrollWidth") <= 390
    fresh(page)  # taken away, the stage stays below the fold
    page.js("Element.prototype.scrollIntoView = () => {}")
    generate(page, steps="40")
    page.until(DENOISING)
    time.sleep(1)
    assert page.js(where) > 500
    quiet(page)


def test_p8_a_mistyped_model_is_said_and_the_next_run_goes(page):
    generate(page, model="/no/such/folder")
    page.until("return document.querySelector('#note').textContent")
    finished(page)


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


def test_cancel_then_generate_again(any_page):
    page = any_page
    generate(page, steps=str(LONG))
    page.until(DENOISING)
    began = time.monotonic()
    page.click("#stop")
    page.until("return document.querySelector('.left .state').textContent == 'cancelled'")
    assert time.monotonic() - began < 5
    finished(page)
