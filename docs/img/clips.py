"""The moving pictures of the README: the accelerated clips of the shipped examples, small.

python docs/img/clips.py
"""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
from PIL import Image

SIDE, QUALITY = 224, 45
HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "assets/examples"


def main() -> None:
    """One animated webp for each example."""
    for number, folder in enumerate(sorted(EXAMPLES.iterdir()), 1):
        frames = iio.imread(folder / "right.mp4", plugin="pyav")
        first, *rest = (Image.fromarray(f).resize((SIDE, SIDE), Image.LANCZOS) for f in frames)
        target = HERE / f"clip-{number}.webp"
        look = {"duration": 1000 // 24, "loop": 0, "quality": QUALITY, "method": 6}
        first.save(target, save_all=True, append_images=rest, **look)
        print(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
