"""Every format carries what its clip was made from, and gives it back letter by letter."""

import numpy as np
import pytest
from PIL import Image

from dit_accel.media import container, metadata, video

FACTS = {
    "dit_accel": "9",
    "prompt": "a 猫 [/b] 🚀\u2028new\0line",
    "negative_prompt": "ü" * 8000,
    "seed": 2**63 - 1,
    "arguments": {"height": 16, "guidance_scale": 3.5},
}
CLIP = np.zeros((3, 17, 31, 3), np.uint8)
NAMES = ("a.mp4", "a.gif", "a.webp", "p.png", "p.jpg", "p.webp")


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path, name):
    frames = CLIP if name[0] == "a" else CLIP[:1]
    path = video.save(tmp_path / name, frames, 8, FACTS)
    assert metadata.read(path) == FACTS


@pytest.mark.parametrize("name", NAMES)
def test_nothing_without_facts(tmp_path, name):
    path = video.save(tmp_path / name, CLIP if name[0] == "a" else CLIP[:1], 8)
    assert metadata.read(path) is None
    assert b"dit_accel" not in path.read_bytes() and b"prompt" not in path.read_bytes()


def test_players_and_viewers_see_the_prompt(tmp_path):
    path = video.save(tmp_path / "a.mp4", CLIP, 8, {"dit_accel": "9", "prompt": "a cat"})
    assert container.tags(path)["title"] == "a cat"
    path = video.save(tmp_path / "a.png", CLIP[:1], 8, {"dit_accel": "9", "prompt": "a cat"})
    with Image.open(path) as picture:
        assert picture.info["Description"] == "a cat"


def test_others_remarks_are_not_ours(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.gif", comment=b"hello")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg", comment=b'{"a": 1}')
    assert metadata.read(tmp_path / "a.gif") is None
    assert metadata.read(tmp_path / "b.jpg") is None


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.gif"])
def test_damaged_files_are_told_in_a_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=name) as refused:
        metadata.read(tmp_path / name)
    assert "\n" not in str(refused.value)
