"""Write the prompt files of a model of scenes: 16 for the grid, 8 to tune on, 64 to report on.

    python assets/training/listed_prompts.py --out assets

The first half of each was trained on, the second half is held out; no prompt is in two files.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import scene_set

FILES = {"prompts.txt": 16, "prompts-tuning.txt": 8, "prompts-report.txt": 64}
SIDE, SEED = 384, 1


def listed() -> dict[str, list[str]]:
    """Name of each file → its prompts; always the same."""
    rng, known = random.Random(SEED), set()
    out: dict[str, list[str]] = {}
    for name, count in FILES.items():
        out[name] = []
        while len(out[name]) < count:
            held = len(out[name]) >= count // 2
            prompt = scene_set.draw(rng, SIDE, held=held).text(articles=True)
            if prompt not in known:
                out[name].append(prompt)
                known.add(prompt)
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("assets"))
    folder = parser.parse_args(argv).out
    for name, prompts in listed().items():
        (folder / name).write_text("\n".join(prompts) + "\n")
        print(f"{folder / name}: {len(prompts)}")


if __name__ == "__main__":
    main()
