"""Files: clips survive the round trip, and a write that fails leaves nothing behind."""

import av
import numpy as np
import pytest
from PIL import Image

from dit_accel.media import video
from dit_accel.media.files import atomic, check_folder, check_target


@pytest.fixture
def clip() -> np.ndarray:
    """uint8 [6, 48, 64, 3]: a smooth gradient that moves."""
    t, y, x = np.meshgrid(np.arange(6), np.arange(48), np.arange(64), indexing="ij")
    return np.stack([x * 3 + t * 5, y * 4, 255 - x * 3], axis=-1).clip(0, 255).astype(np.uint8)


def test_mp4_round_trip(tmp_path, clip):
    path = video.save(tmp_path / "new" / "clip.mp4", clip, fps=12)
    back = video.read(path)
    assert back.shape == clip.shape
    assert np.abs(back.astype(int) - clip).mean() < 3


def test_mp4_is_what_browsers_play(tmp_path, clip):
    path = video.save(tmp_path / "clip.mp4", clip, fps=23.976)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert float(stream.average_rate) == pytest.approx(23.976, abs=1e-3)
    blob = path.read_bytes()
    assert blob.index(b"moov") < blob.index(b"mdat")


def test_odd_sides_keep_their_picture(tmp_path, clip):
    path = video.save(tmp_path / "odd.mp4", clip[:, :47, :63])
    assert video.read(path).shape == (6, 48, 64, 3)


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp"])
def test_moving_pictures(tmp_path, clip, name):
    with Image.open(video.save(tmp_path / name, clip, fps=10)) as picture:
        assert picture.n_frames == 6
        picture.load()
        assert picture.info["duration"] == 100


def test_png_is_exact(tmp_path, clip):
    path = video.save(tmp_path / "one.png", clip[:1])
    assert np.array_equal(np.asarray(Image.open(path)), clip[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "clip.mp4"
    path.write_text("old")
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_encoder_leaves_nothing(tmp_path, clip):
    with pytest.raises(ValueError):
        video.save(tmp_path / "clip.mp4", clip[..., :2])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "moving", "says"),
    [
        ("clip.txt", True, "ends in .mp4, .gif, .webp"),
        ("clip.png", True, "not 'clip.png'"),
        ("one.mp4", False, "ends in .png"),
    ],
)
def test_names_are_checked(tmp_path, name, moving, says):
    with pytest.raises(ValueError, match=says):
        check_target(tmp_path / name, moving)


def test_folders_are_checked(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_folder(tmp_path / "file" / "deep")
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_target(tmp_path / "dir.mp4")
    assert check_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()


def test_side_by_side_keeps_both_clips(clip):
    both = video.side_by_side(clip, clip[::-1], ("dense", "accelerated"))
    assert both.shape[0] == 6
    assert np.array_equal(both[:, -48:, :64], clip)
    assert np.array_equal(both[:, -48:, -64:], clip[::-1])
    strip = both[0, :-48]
    assert strip.min() < 100, "the labels are drawn"
    with pytest.raises(ValueError, match="differ in shape"):
        video.side_by_side(clip, clip[:3])


def test_difference_is_black_where_equal(clip):
    other = clip.copy()
    other[:, 0, 0] ^= 7
    apart = video.difference(clip, other)
    assert apart[:, 1:].max() == 0
    assert apart[0, 0, 0].tolist() == [28, 28, 28]


def test_contact_sheet_has_three_rows(clip):
    sheet = video.contact_sheet(clip, clip, ("dense", "topk"), columns=3)
    strip = (len(sheet) - 3 * 48) // 3
    assert sheet.shape[1] == 3 * 64 + 2 * 4
    first = sheet[strip : strip + 48]
    assert np.array_equal(first[:, :64], clip[0])
    assert np.array_equal(first[:, -64:], clip[5])
    assert sheet[-48:, :64].max() == 0
    assert video.contact_sheet(clip[:1], clip[:1], ("dense", "topk")).shape[1] == 64
