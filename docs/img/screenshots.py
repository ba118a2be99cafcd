"""The page's pictures in this folder, from its first stored example.

PYTHONPATH=benchmarks:tests python docs/img/screenshots.py   needs chromium, chromedriver, selenium
"""

import io
import time
from pathlib import Path

from browser import Tab
from page_time import PLAYING, opened
from PIL import Image

FOLDER = Path(__file__).parent


def shoot(tab: Tab, width: int, height: int, dark: bool, do: str = "") -> Image.Image:
    """The page at this size; `do` is run on it before the picture is taken."""
    tab.resize((width, height))
    tab.dark(dark)
    tab.open()
    tab.until(PLAYING)
    time.sleep(2)
    tab.js(do)
    time.sleep(1)
    return Image.open(io.BytesIO(tab.picture())).convert("RGB")


def beside(pictures: list[Image.Image], gap: int = 0) -> Image.Image:
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    out = Image.new("RGB", (width, pictures[0].height), "white")
    for number, picture in enumerate(pictures):
        out.paste(picture, (number * (picture.width + gap), 0))
    return out


def main() -> None:
    with opened(warm=False) as tab:
        pages = [shoot(tab, 1280, 1790, dark) for dark in (False, True)]
        results = "document.querySelector('.two').scrollIntoView()"
        phones = [shoot(tab, 400, 1500, dark, do) for dark, do in ((False, ""), (True, results))]
        wiped = shoot(tab, 1280, 900, False, "document.querySelector('[data-view=wipe]').click()")
    beside([p.resize((900, 1258)) for p in pages]).save(FOLDER / "page.jpg", quality=85)
    beside(phones, 20).save(FOLDER / "phone.jpg", quality=85)
    wiped.resize((1000, 703)).save(FOLDER / "wipe.jpg", quality=85)


if __name__ == "__main__":
    main()
