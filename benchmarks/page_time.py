"""Seconds from a click on Generate to both clips playing, in headless Chromium, with the embedded
model at its defaults.

    python benchmarks/page_time.py     needs chromium, chromedriver and selenium

Prints the wall time of the first and of a second click, and what the page says of each side.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver

from dit_accel.app import server
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk
from dit_accel.app.page import build
from dit_accel.app.studio import Studio

READY = "return document.querySelector('#go') && document.querySelector('#results .heat')"
DONE = (
    "return document.querySelectorAll('figure.clip').length == 2 &&"
    " [...document.querySelectorAll('video')].every(v => v.src.includes('/jobs') && v.src != '{}')"
    " && !document.querySelector('#go').disabled"
)


def browser(profile: Path) -> webdriver.Chrome:
    """Chromium without a window."""
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={profile}")
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def wait(driver: webdriver.Chrome, code: str, seconds: float) -> None:
    """Until the code is true on the page; TimeoutError after so many seconds."""
    end = time.monotonic() + seconds
    while not driver.execute_script(code):
        if time.monotonic() > end:
            raise TimeoutError(f"after {seconds} s never true: {code}")
        time.sleep(0.1)


@contextmanager
def served() -> Iterator[tuple[webdriver.Chrome, str]]:
    """A browser, and the address of the page with the embedded model."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = Path(folder) / "jobs"
        jobs.mkdir()
        demo = build(Desk(Studio(), jobs), Limits())
        options = {"server_name": "127.0.0.1", "prevent_thread_lock": True}
        _, address, _ = demo.launch(**options, **server.settings(jobs))
        driver = browser(Path(folder) / "profile")
        try:
            yield driver, address
        finally:
            driver.quit()
            demo.close()


def main() -> None:
    with served() as (driver, address):
        driver.get(address)
        wait(driver, READY, 60)
        time.sleep(2)  # Gradio drops the answer to a click that comes while it mounts the page
        for number in ("first", "second"):
            old = driver.execute_script("return document.querySelector('video').src")
            began = time.monotonic()
            driver.execute_script("document.querySelector('#go').click()")
            wait(driver, "return document.querySelector('#go').disabled", 30)
            wait(driver, DONE.replace("{}", old), 900)
            print(f"{number} click: {time.monotonic() - began:.1f} s", flush=True)
            print(
                driver.execute_script("return document.querySelector('#results').innerText")[:500]
            )


if __name__ == "__main__":
    main()
