"""One tab of the page in headless Chromium, for tests, times and pictures.

Needs chromium, its driver and selenium; axe-core's file, where AXE or an npm folder names it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
DESKTOP, PHONE = (1280, 900), (390, 844)
READY = "return document.documentElement.dataset.ready === 'true'"


class Tab:
    """One browser with one tab, at a size; `profile` is a folder of its own."""

    def __init__(self, url: str, profile: Path, size: tuple[int, int] = DESKTOP) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver, self.url = webdriver.Chrome(options=options, service=service), url
        self.resize(size)

    def resize(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        self.cdp("Emulation.setDeviceMetricsOverride", **metrics, mobile=size[0] < 600)

    def dark(self, wanted: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def cdp(self, command: str, **values: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, values)

    def open(self, rest: str = "") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.url + rest)
        self.until(READY)

    def reload(self) -> None:
        self.driver.refresh()
        self.until(READY)

    def js(self, code: str, *values: Any) -> Any:
        return self.driver.execute_script(code, *values)

    def until(self, code: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < end, f"never true: {code}; the page says {self.text()!r}"
            time.sleep(0.05)

    def text(self, query: str = "body") -> str:
        return self.js("return document.querySelector(arguments[0])?.innerText || ''", query)

    def click(self, query: str) -> None:
        self.js("document.querySelector(arguments[0]).click()", query)

    def fill(self, query: str, value: str) -> None:
        self.js(
            "const box = document.querySelector(arguments[0]); box.value = arguments[1];"
            "for (const kind of ['input', 'change'])"
            " box.dispatchEvent(new Event(kind, {bubbles: true}));",
            query,
            value,
        )

    def rule(self, css: str) -> None:
        """One more rule of style, until the page is opened again."""
        last = "const s = document.styleSheets[0]; s.insertRule(arguments[0], s.cssRules.length)"
        self.js(last, css)

    def keys(self, query: str, *keys: str) -> None:
        self.driver.find_element("css selector", query).send_keys(*keys)

    def picture(self) -> bytes:
        return base64.b64decode(self.cdp("Page.captureScreenshot", format="png")["data"])

    def network(self) -> list[dict[str, Any]]:
        """What the browser has sent and received since it was asked last."""
        log = self.driver.get_log("performance")
        return [json.loads(entry["message"])["message"] for entry in log]

    def severe(self) -> list[str]:
        """Errors in the console, those of refused requests left out."""
        found = [e for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]
        return [e["message"] for e in found if "Failed to load resource" not in e["message"]]

    def close(self) -> None:
        self.driver.quit()


@contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """The address of an ASGI app that runs in a thread."""
    import uvicorn

    config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(10)


def axe() -> Path | None:
    """axe-core's script, where there is one: `npm install axe-core`, or AXE=path."""
    places = [os.environ.get("AXE", ""), "node_modules/axe-core/axe.min.js"]
    return next((Path(p) for p in places if p and Path(p).is_file()), None)
