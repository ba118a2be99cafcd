"""The training scripts are plain modules in one folder; the synthetic archive has three clips."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "assets" / "training"))

NAMES = ["red heart", "rocket", "t-rex"]
FRAMES, SIDE = 9, 32


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive as prepare_data.py writes it: coloured squares that move."""
    from emoji_set import COLOURS, held_out
    from prepare_data import encode

    folder = tmp_path_factory.mktemp("archive")
    entries = []
    for number, name in enumerate(NAMES):
        rgba = np.zeros((FRAMES, SIDE, SIDE, 4), np.uint8)
        for t in range(FRAMES):
            rgba[t, 8:24, 4 + t : 18 + t] = (*np.eye(3, dtype=np.uint8)[number] * 200, 255)
        encode(rgba, folder / f"{number}.avif")
        entries.append({"file": f"{number}.avif", "name": name, "held_out": held_out(name)})
    manifest = {"fps": 24, "frames": FRAMES, "size": SIDE, "colours": COLOURS, "clips": entries}
    (folder / "captions.json").write_text(json.dumps(manifest))
    return folder
