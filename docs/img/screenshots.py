"""The page's pictures in this folder, from its first stored example.

PYTHONPATH=benchmarks python docs/img/screenshots.py     needs chromium, chromedriver, selenium
"""

import base64
import io
import time
from pathlib import Path

from page_time import READY, served, wait
from PIL import Image

FOLDER = Path(__file__).parent


def shoot(driver, address: str, width: int, height: int, dark: bool, do: str = "") -> Image.Image:
    """The page at this size; `do` is run on it before the picture is taken."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(f"{address}?__theme={'dark' if dark else 'light'}")
    wait(driver, READY, 60)
    time.sleep(2)
    driver.execute_script(do)
    time.sleep(1)
    data = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def beside(pictures: list[Image.Image], gap: int = 0) -> Image.Image:
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    out = Image.new("RGB", (width, pictures[0].height), "white")
    for number, picture in enumerate(pictures):
        out.paste(picture, (number * (picture.width + gap), 0))
    return out


def main() -> None:
    with served() as (driver, address):
        pages = [shoot(driver, address, 1280, 1790, dark) for dark in (False, True)]
        results = "document.querySelector('#results').scrollIntoView(); window.scrollBy(0, -520)"
        phones = [
            shoot(driver, address, 400, 1500, dark, do)
            for dark, do in ((False, ""), (True, results))
        ]
        wipe = "document.querySelector('.views [data-view=wipe]').click()"
        wiped = shoot(driver, address, 1280, 900, False, wipe)
    beside([p.resize((900, 1258)) for p in pages]).save(FOLDER / "page.jpg", quality=85)
    beside(phones, 20).save(FOLDER / "phone.jpg", quality=85)
    wiped.resize((1000, 703)).save(FOLDER / "wipe.jpg", quality=85)


if __name__ == "__main__":
    main()
