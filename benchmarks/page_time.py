"""First paint, an example playing, weight, and seconds from a click to both clips, in headless
Chromium, with the embedded model at its defaults.

    PYTHONPATH=tests python benchmarks/page_time.py [--no-click]

Needs chromium, chromedriver and selenium.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from browser import Tab, served

from dit_accel.app import server
from dit_accel.app.ask import Limits
from dit_accel.app.desk import Desk
from dit_accel.app.studio import Studio

PLAYING = (
    "const v = [...document.querySelectorAll('video')];"
    "return v.length == 2 && v.every(x => x.currentTime > 0 && !x.paused)"
)
DONE = (
    "return [...document.querySelectorAll('video')].every(v => v.src.includes('/jobs/')"
    " && v.src != '{}') && !document.querySelector('#go').disabled"
    " && document.querySelector('.headline')"
)


@contextmanager
def opened(warm: bool = True) -> Iterator[Tab]:
    """A browser that is about to open the page with the embedded model."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Studio(), Path(folder) / "jobs", Limits())
        with served(server.build(desk, warm=warm)) as address:
            tab = Tab(address, Path(folder) / "profile")
            try:
                yield tab
            finally:
                tab.close()


def first_sight(tab: Tab) -> None:
    tab.open()
    tab.until(PLAYING)
    playing = tab.js("return performance.now()")
    paint = tab.js("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
    time.sleep(3)
    print(f"first paint {paint:.0f} ms, an example plays after {playing:.0f} ms")
    print(f"{weight(tab):,} bytes, clips included")


def weight(tab: Tab) -> int:
    """Bytes received from the page's own server since the browser began."""
    own, total = set(), 0
    for message in tab.network():
        values = message["params"]
        if message["method"] == "Network.requestWillBeSent":
            own |= {values["requestId"]} if values["request"]["url"].startswith(tab.url) else set()
        if message["method"] == "Network.loadingFinished" and values["requestId"] in own:
            total += values["encodedDataLength"]
    return total


def main() -> None:
    with opened() as tab:
        first_sight(tab)
        tab.click("#reset")
        for number in ("first", "second") if "--no-click" not in sys.argv else ():
            old = tab.js("return document.querySelector('video').src")
            began = time.monotonic()
            tab.click("#go")
            tab.until(DONE.replace("{}", old), 1200)
            print(f"{number} click: {time.monotonic() - began:.1f} s", flush=True)
            print(tab.text("#results")[:300])


if __name__ == "__main__":
    main()
