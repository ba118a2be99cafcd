"""The real page in headless Chromium: `make test-browser`. Needs chromium, its driver, selenium.

A tiny random model stands behind it, so that a generation takes a second.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from asks import DEFAULTS
from tiny import tiny_wan

from dit_accel.app import server
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk
from dit_accel.app.page import build
from dit_accel.app.studio import Studio

pytestmark = pytest.mark.browser

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--autoplay-policy=no-user-gesture-required",
)
LONG = 400


class Page:
    """One tab of the page."""

    def __init__(self, url: str, profile: Path, width: int = 1280) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver, self.url = webdriver.Chrome(options=options, service=service), url
        self.open()

    def open(self) -> None:
        self.driver.get(self.url)
        self.until("return document.querySelector('#go') && document.querySelector('.stage')")
        self.until("return document.querySelector('#results .heat')")
        time.sleep(1)  # Gradio drops the answer to a click that comes while it mounts the page
        self.click("#clip .label-wrap")
        self.until("return document.querySelector('#steps input')")

    def js(self, code: str):
        return self.driver.execute_script(code)

    def until(self, code: str, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < end, f"never true: {code}; the page says {self.text()!r}"
            time.sleep(0.1)

    def text(self) -> str:
        return self.js("return document.body.innerText")

    def click(self, query: str) -> None:
        self.js(f"document.querySelector({json.dumps(query)}).click()")

    def fill(self, query: str, value: str) -> None:
        self.js(
            f"const box = document.querySelector({json.dumps(query)});"
            f"box.value = {json.dumps(value)};"
            "box.dispatchEvent(new Event('input', {bubbles: true}));"
            "box.dispatchEvent(new Event('blur', {bubbles: true}));"
        )

    def generate(self, steps: int = 4) -> None:
        wanted = {"steps": steps, "width": 128, "height": 128, "frames": 9}
        for name, value in wanted.items():
            self.fill(f"#{name} input", str(value))
        time.sleep(0.5)  # the page sends a changed number on its own time
        self.click("#go")

    def outside(self) -> set[str]:
        """Addresses that the page asked for elsewhere."""
        sent = (json.loads(entry["message"]) for entry in self.driver.get_log("performance"))
        sent = (m["message"] for m in sent)
        urls = {
            m["params"]["request"]["url"]
            for m in sent
            if m["method"] == "Network.requestWillBeSent"
        }
        return {u for u in urls if u.startswith("http") and not u.startswith(self.url)}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    torch.set_num_threads(1)
    pipe = tiny_wan()
    jobs = tmp_path_factory.mktemp("jobs")
    demo = build(Desk(Studio(lambda name: (pipe, DEFAULTS)), jobs), Limits(steps=LONG))
    _, address, _ = demo.launch(
        server_name="127.0.0.1", prevent_thread_lock=True, **server.settings(jobs)
    )
    yield address
    demo.close()


@pytest.fixture
def page(url, tmp_path):
    found = Page(url, tmp_path / "profile")
    yield found
    found.driver.quit()


FRESH = (
    "return document.querySelectorAll('figure.clip').length == 2 &&"
    " [...document.querySelectorAll('video')].every(v => v.src.includes('/jobs')) &&"
    " !document.querySelector('#go').disabled"
)
VIDEOS = "const [a, b] = document.querySelectorAll('video');"


def test_generate_play_wipe_and_difference(page):
    page.generate()
    page.until(FRESH)
    page.until(VIDEOS + "return a.currentTime > 0 && !a.paused && !b.paused")
    apart = [page.js(VIDEOS + "return Math.abs(a.currentTime - b.currentTime)") for _ in range(5)]
    assert sorted(apart)[2] < 2 / DEFAULTS.fps
    page.click(".views [data-view=wipe]")
    page.js("const c = document.querySelector('.cut'); c.value = 20; c.oninput()")
    assert (
        page.js("return document.querySelector('.stage').style.getPropertyValue('--cut')") == "20%"
    )
    page.click(".views [data-view=apart]")
    page.js("const c = document.querySelector('.at'); c.value = 4; c.oninput()")
    page.until(VIDEOS + "return a.paused && b.paused && a.currentTime == b.currentTime")
    page.until("return document.querySelector('.where').textContent == '5 / 9'")
    assert page.js("return document.querySelectorAll('.heat i').length") == 4 * 2
    for link in page.js("return [...document.querySelectorAll('.downloads a')].map(a => a.href)"):
        status = page.js(
            f"return fetch({json.dumps(link)}).then(r => r.status)",
        )
        assert status in (200, 206)  # a clip the player has may come in part
    assert page.outside() == set()
    severe = [e for e in page.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert severe == []


def test_a_stored_example_plays_at_first_sight_and_another_on_a_click(page):
    page.until(VIDEOS + "return a.currentTime > 0 && !a.paused && !b.paused")
    first = page.js(VIDEOS + "return a.src")
    page.click("#chips button:nth-of-type(3)")
    page.until(VIDEOS + f"return a.src != {json.dumps(first)} && !a.paused && !b.paused")
    page.until("return document.querySelector('#prompt textarea').value.startsWith('unicorn')")
    page.until("return document.querySelector('.results').innerText.includes('part of the tokens')")


def test_cancel_then_generate_again(page):
    page.generate(LONG)
    page.until("return document.querySelector('.left .state').textContent.includes('denoising')")
    began = time.monotonic()
    page.click("#stop")
    page.until("return document.querySelector('.left .state').textContent == 'cancelled'")
    assert time.monotonic() - began < 10
    page.generate()
    page.until(FRESH)


def test_bad_input_is_said_and_nothing_runs(page):
    page.fill("#prompt textarea", "   ")
    time.sleep(0.5)
    page.click("#go")
    page.until("return document.body.innerText.includes('The prompt is empty')")
    time.sleep(2)  # for what follows the refusal
    for words in ("The prompt is empty", "Generate both", "What ran"):
        assert words in page.text()
    assert not page.js("return document.querySelector('#go').disabled")


def test_what_a_visitor_types_is_shown_and_never_run(page):
    prompt = "<img src=x onerror=\"document.title='run'\"> {{ 7*7 }} ${7*7} <b>bold</b>"
    page.fill("#prompt textarea", prompt)
    page.generate()
    page.until(FRESH)
    assert page.js("return document.querySelector('.results .prompt').textContent") == f"“{prompt}”"
    assert page.js("return document.title") != "run"


def test_reload_during_a_run_frees_the_machine(page):
    page.generate(LONG)
    page.until("return document.querySelector('.left .state').textContent.includes('denoising')")
    page.open()
    page.generate()
    page.until(FRESH)


def test_two_tabs(page, url, tmp_path):
    other = Page(url, tmp_path / "other")
    try:
        page.generate(8)
        other.generate(4)
        page.until(FRESH)
        other.until(FRESH)
        assert page.js(VIDEOS + "return a.src") != other.js(VIDEOS + "return a.src")
        assert page.js("return document.querySelectorAll('.heat i').length") == 8 * 2
        assert other.js("return document.querySelectorAll('.heat i').length") == 4 * 2
    finally:
        other.driver.quit()


def test_a_phone_has_no_sideways_scroll(url, tmp_path):
    page = Page(url, tmp_path / "phone", width=500)
    try:
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        page.open()
        assert page.js("return document.documentElement.scrollWidth") <= 390
    finally:
        page.driver.quit()
