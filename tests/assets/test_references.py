"""The small training clips: written from an archive, and each found again by itself."""

import sys
from pathlib import Path

import pytest

from dit_accel.evaluate.recognition import References


def test_the_archive_becomes_small_clips(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import references
    from clips import Clips, composite

    out = tmp_path / "small.safetensors"
    monkeypatch.setattr(references, "EVERY", 4)
    monkeypatch.setattr(sys, "argv", ["references.py", "--data", str(archive), "--out", str(out)])
    references.main()
    small, clips = References.load(out), Clips.load(archive, "cpu")
    assert small.names == clips.names and small.frames[:2] == [0, 4]
    assert small.rgba.shape[2:] == (references.SIDE, references.SIDE, 4)
    for number, name in enumerate(clips.names):
        for background, colour in zip(clips.palette(), clips.colours, strict=True):
            frames = composite(clips.rgba[number : number + 1], background[None])[0]
            clip = ((frames + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
            assert small.nearest(clip) == (name, colour)
