"""What a visitor of the page does in a browser, and what a test waits for."""

from browser import Tab

from dit_accel.app.catalog import card

SMALL = {"steps": "4", "size": "128x128", "frames": "9", "right-min_tokens": "0"}
LONG = 1000  # steps of a run that does not end by itself
DONE = (
    "return document.querySelectorAll('figure.clip').length == 2 &&"
    " [...document.querySelectorAll('video')].every(v => v.src.includes('/jobs/')) &&"
    " !document.querySelector('#go').disabled && document.querySelector('.headline') !== null"
)
VIDEOS = "const [a, b] = document.querySelectorAll('video');"
DENOISING = "return document.querySelector('.left .state').textContent.includes('denoising')"
AFRESH = "return !document.querySelector('.headline')"


def fresh(tab: Tab, rest: str = "") -> Tab:
    """As a visitor who comes for the first time."""
    tab.driver.get(tab.url + "static/page.css")
    tab.js("localStorage.clear(); sessionStorage.clear()")
    tab.open(rest)
    return tab


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


def finished(page: Tab, **changed: str) -> None:
    """A run from its settings to both clips."""
    generate(page, **changed)
    page.until(DONE)


def again(page: Tab) -> None:
    """The settings as they are, to both clips."""
    page.click("#go")
    page.until(AFRESH)
    page.until(DONE)
