"""Whether a clip can be written is known before work begins; what stood there stays."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from dit_accel.media import files, names, video
from dit_accel.media.files import atomic, check_folder, check_own, check_target, make_folder

CLIP = np.zeros((2, 16, 16, 3), np.uint8)
LONG = "n" * 251 + ".mp4"  # as long as a name can be


def test_a_name_as_long_as_can_be_is_written(tmp_path):
    assert video.save(check_target(tmp_path / LONG), CLIP).is_file()
    assert [path.name for path in tmp_path.iterdir()] == [LONG]


@pytest.mark.parametrize(
    ("path", "moving", "says"),
    [
        ("猫" * 84 + ".mp4", True, "has 256 bytes, at most 255"),
        ("a/" * 2100 + "x.mp4", True, "longer than 4095 bytes"),
        ("a\0b.mp4", True, "holds a NUL"),
        ("x.png", True, "ends in .mp4"),
        ("x.mp4", False, "ends in .png"),
        ("x.txt", None, "a clip or a picture ends in"),
        ("/proc/x.mp4", True, "cannot be written to"),
        ("/proc/new/folder/x.mp4", True, "cannot be written to"),
        ("/dev/null/x.mp4", True, "is a file: a folder was expected"),
        ("folder.mp4", True, "is a folder"),
        ("pipe.mp4", True, "is no regular file"),
    ],
)
def test_refused_before_the_work(tmp_path, monkeypatch, path, moving, says):
    monkeypatch.chdir(tmp_path)
    Path("folder.mp4").mkdir()
    os.mkfifo("pipe.mp4")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=says):
        check_target(path, moving)
    assert sorted(tmp_path.iterdir()) == before


def test_room_is_looked_for(tmp_path, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(p)._replace(free=10 * 2**20))
    assert check_target(tmp_path / "x.mp4")
    with pytest.raises(ValueError, match=r"10\.0 MiB free, 20\.0 are needed"):
        check_target(tmp_path / "x.mp4", room=20 * 2**20)


def test_a_folder_that_takes_no_files(tmp_path, monkeypatch):
    def readonly(**options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", readonly)
    with pytest.raises(ValueError, match="Read-only file system"):
        check_folder(tmp_path)
    with pytest.raises(ValueError, match="Read-only file system"):
        make_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.mp4"
    link.symlink_to(tmp_path / "real" / "clip.mp4")
    for _ in range(2):  # once to nothing, once to a clip
        video.save(check_target(link), CLIP)
        assert link.is_symlink() and len(video.read(tmp_path / "real" / "clip.mp4")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.mp4", "real"]
    assert len(list((tmp_path / "real").iterdir())) == 1


def test_a_clip_that_cannot_be_written_is_kept_and_named(tmp_path, monkeypatch):
    save, target = video.save, tmp_path / "gone" / "clip.mp4"

    def full(path, *rest):
        if Path(path) == target:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, *rest)

    monkeypatch.setattr(video, "save", full)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(video.NotWritten, match="No space left on device.*the clip is in") as told:
        video.save_or_rescue(target, CLIP, 8)
    kept = Path(str(told.value).split(" is in ")[1])
    assert kept.name == "clip.mp4" and len(video.read(kept)) == 2 and told.value.exit_code == 1


def test_an_encoder_that_fails_says_nothing_more(tmp_path, capfd):
    with pytest.raises(OSError), atomic(tmp_path / "x.mp4") as temporary:
        temporary.symlink_to("/dev/full")
        noise = np.random.default_rng(0).integers(0, 255, (30, 256, 256, 3), np.uint8)
        video.encode(temporary, noise, 8, {})
    assert "Exception ignored" not in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_somebody_elses_files_are_not_ours(tmp_path):
    check_own(tmp_path, "report.json", ["dense.mp4"])
    (tmp_path / "holiday.mp4").write_text("mine")
    check_own(tmp_path, "report.json", ["dense.mp4"])
    (tmp_path / "dense.mp4").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"dense\.mp4 was not written by this command"):
        check_own(tmp_path, "report.json", ["dense.mp4"])
    (tmp_path / "report.json").write_text('{"dit_accel": "1"}')
    check_own(tmp_path, "report.json", ["dense.mp4"])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A cat, red!", "a-cat-red"),
        ("красный кот", "красный-кот"),
        ("红色的猫", "红色的猫"),
        ("un été", "un-été"),
        ("CON", "con-clip"),
        ("🚀", ""),
        ("../../etc/passwd", "etc-passwd"),
        ("a_b", "a-b"),
    ],
)
def test_names_from_prompts(text, name):
    assert names.from_text(text) == name


def test_names_are_cut_between_letters():
    for most in range(1, 40):
        name = names.from_text("red 红色的猫 🚀 été" * 9, most)
        assert len(name.encode()) <= most and "\ufffd" not in name
